"""Pixels of an open dataset, piece by piece: values in known units, and validity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xsmae.data.raster_validity import Validity
from xsmae.data.raster_values import Values
from xsmae.errors import UserError

if TYPE_CHECKING:
    import rasterio

EXACT = 2**24  # pixels up to which each is looked at
PIECE = 2**22  # numbers that are read at a time, at least a row

Region = tuple[int, int, int, int]  # top, left, height, width


class Datasets(NamedTuple):
    """What is read, or a window of it that is kept; and the whole raster, where `read`
    is an overview."""

    read: rasterio.DatasetReader
    whole: rasterio.DatasetReader | None


def check_window(
    window: Sequence[float],
    size: int | Sequence[int] | None,
    shape: tuple[int, int],
    where: str,
) -> tuple[float, float, float, float]:
    """The window of `Raster.read`; UserError unless a part of it lies in the raster."""
    top, left, height, width = map(float, window)
    finite = all(map(math.isfinite, (top, left, height, width)))
    inside = -height < top < shape[0] and -width < left < shape[1]
    if not finite or min(height, width) <= 0 or not inside:
        raise UserError(
            f"{where}: window (top, left, height, width) = {tuple(window)}; expected a "
            f"part of {shape[0]} x {shape[1]} pixels"
        )
    if size is None:
        if any(not x.is_integer() for x in (top, left, height, width)):
            raise UserError(f"window {tuple(window)}; expected whole pixels, or a size")
    elif np.min(size) < 1 or np.size(size) > 2:
        raise UserError(f"size={size}; expected pixels above 0, or (height, width)")
    return top, left, height, width


def value_pieces(
    datasets: Datasets,
    region: Region,
    indexes: Sequence[int],
    chosen: Sequence[int],
    values: Values,
    validity: Validity,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First row, values with 0 where not valid, and validity, of the full width.

    region: may reach out of the raster. indexes: GDAL's, of all bands. chosen: the
    places among them of those that are read.
    """
    left, width = region[1], region[3]
    dataset, whole = datasets
    for inside in windows(dataset, region, len(chosen)):
        numbers = dataset.read([indexes[i] for i in chosen], window=inside)
        good = validity.of(dataset, inside, numbers, chosen, whole)
        found = values.of(numbers, chosen)
        if numbers.dtype.itemsize > 2:  # a scale can lead out of float32
            good &= np.isfinite(found).all(axis=-1)
        if not good.all():
            found[~good] = 0
        if inside.width < width:
            begin = inside.col_off - left
            beside = (begin, width - begin - inside.width)
            found = np.pad(found, ((0, 0), beside, (0, 0)))
            good = np.pad(good, ((0, 0), beside))
        yield inside.row_off, found, good


def put_together(
    pieces: Iterable[tuple[int, np.ndarray, np.ndarray]], region: Region, bands: int
) -> tuple[np.ndarray, np.ndarray]:
    """The values and the validity of a region, copied piece by piece."""
    top, _, height, width = region
    pieces = iter(pieces)
    first = next(pieces, None)
    if first is not None:
        above, values, valid = first
        if (above, len(valid)) == (top, height):
            return values, valid
        pieces = itertools.chain([first], pieces)
    # Each band is one piece of memory, as `Values.of` makes them.
    values = np.moveaxis(np.zeros((bands, height, width), np.float32), 0, -1)
    valid = np.zeros((height, width), bool)
    for above, some, good in pieces:
        values[above - top : above - top + len(some)] = some
        valid[above - top : above - top + len(some)] = good
    return values, valid


def valid_pieces(
    datasets: Datasets,
    region: Region,
    indexes: Sequence[int],
    validity: Validity,
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and validity in all bands, of a region within the raster."""
    chosen = range(len(indexes))
    dataset, whole = datasets
    for inside in windows(dataset, region, len(chosen)):
        numbers = None
        if validity.by_number:
            numbers = dataset.read(list(indexes), window=inside)
        yield inside.row_off, validity.of(dataset, inside, numbers, chosen, whole)


def windows(
    dataset: rasterio.DatasetReader, region: Region, bands: int
) -> Iterator[rasterio.windows.Window]:
    """What of a region lies in the raster, in pieces of whole rows of blocks."""
    from rasterio.windows import Window

    top, left, height, width = region
    bottom, right = min(top + height, dataset.height), min(left + width, dataset.width)
    top, left = max(top, 0), max(left, 0)
    if bottom <= top or right <= left:
        return
    block = dataset.block_shapes[0][0]
    rows = max(1, PIECE // ((right - left) * bands))
    if rows >= block:
        rows -= rows % block
    while top < bottom:
        # Up to the edge of a block, so that none is decoded twice.
        end = min(bottom, top - top % rows + rows)
        yield Window(left, top, right - left, end - top)
        top = end


def some_blocks(dataset: rasterio.DatasetReader, band: int) -> list[Region]:
    """Blocks with EXACT pixels or a little less, always the same of a raster."""
    height, width = dataset.block_shapes[band - 1]
    down, across = -(-dataset.height // height), -(-dataset.width // width)
    wanted = max(1, min(down * across, EXACT // (height * width)))
    chosen = np.random.default_rng(0).choice(down * across, wanted, replace=False)
    regions = []
    for place in sorted(map(int, chosen)):
        row, column = divmod(place, across)
        top, left = row * height, column * width
        size = min(height, dataset.height - top), min(width, dataset.width - left)
        regions.append((top, left, *size))
    return regions
