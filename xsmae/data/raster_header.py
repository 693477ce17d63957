"""What a raster's header declares: whether it can be read at all, and its overviews."""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.errors import BadImageError, UserError, printable

if TYPE_CHECKING:
    import rasterio

MAX_BLOCK = 2**29  # bytes of a block, which GDAL decodes as a whole
# A file that declares more pixels than it can hold: bytes of pixels for each of the
# file, and bytes below which that does not matter. Deflate reaches 1000, zeros more.
MAX_RATIO, HARMLESS = 10_000, 2**30


@dataclasses.dataclass(frozen=True)
class Overviews:
    """factors: how many pixels of the raster one of each level spans, along an axis.

    averaged: the pixels are averages, hence good for values and not for validity alone.
    """

    factors: tuple[int, ...] = ()
    averaged: bool = True
    notes: tuple[str, ...] = ()

    def level(self, factor: float, *, values: bool = True) -> int | None:
        """The coarsest level of at most `factor`, None for the raster itself."""
        fits = [f for f in self.factors if f <= factor]
        if not fits or (values and not self.averaged):
            return None
        return self.factors.index(max(fits))

    def small_enough(self, factor: float) -> int | None:
        """The finest level of at least `factor`, None if there is none."""
        fits = [f for f in self.factors if f >= factor]
        return self.factors.index(min(fits)) if fits else None


def check_header(dataset: rasterio.DatasetReader, where: str) -> None:
    """Refuse what has no pixels, and what would take too much memory."""
    if not dataset.count:
        inner = dataset.subdatasets
        found = (
            f"{len(inner)} rasters in it, such as {inner[0]}" if inner else "no bands"
        )
        raise UserError(f"{where}: {printable(found)}; give the name of one raster")
    if dataset.driver == "GTiff" and gdal.is_file(dataset.name):
        _check_directories(dataset.name, where)
    sizes = [_bytes_of(dtype) for dtype in dataset.dtypes]
    height, width = dataset.block_shapes[0]
    pixel = dataset.interleaving is not None and dataset.interleaving.value == "PIXEL"
    block = height * width * (sum(sizes) if pixel else max(sizes))
    if block > MAX_BLOCK:
        raise BadImageError(
            f"{where}: blocks of {height} x {width} pixels, {block >> 20} MiB; at most "
            f"{MAX_BLOCK >> 20} MiB: write it in tiles (gdal_translate -co TILED=YES)"
        )
    stored = gdal.stamp_of(dataset.name)
    declared = dataset.height * dataset.width * sum(sizes)
    if (
        stored is not None
        and dataset.driver == "GTiff"
        and declared > max(HARMLESS, MAX_RATIO * stored[0])
    ):
        raise BadImageError(
            f"{where}: declares {dataset.height} x {dataset.width} pixels, "
            f"{declared >> 30} GiB, in a file of {stored[0]} bytes"
        )


def _check_directories(path: str, where: str) -> None:
    """Refuse a TIFF whose later directories are cut off.

    GDAL reads what is left, without a word: a mask may have been in them.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        order = "<" if file.read(2) == b"II" else ">"
        (version,) = struct.unpack(order + "H", file.read(2))
        # BigTIFF's numbers are longer, and the first place comes 4 bytes later.
        first, count, entry, place = (
            (8, "Q", 20, "Q") if version == 43 else (4, "H", 12, "I")
        )
        seen, at = set(), first
        while True:
            file.seek(at)
            (offset,) = struct.unpack(order + place, file.read(struct.calcsize(place)))
            if not offset or offset in seen:
                return
            seen.add(offset)
            file.seek(offset)
            head = file.read(struct.calcsize(count))
            width = struct.calcsize(count)
            entries = struct.unpack(order + count, head)[0] if len(head) == width else 0
            at = offset + width + entry * entries
            if len(head) < width or at + struct.calcsize(place) > size:
                raise BadImageError(
                    f"{where}: a directory at byte {offset} is cut off, the file has "
                    f"{size} bytes: it is truncated"
                )


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "complex_int16" else np.dtype(dtype).itemsize


def find_overviews(dataset: rasterio.DatasetReader) -> Overviews:
    """The overviews that all bands have."""
    factors = [tuple(dataset.overviews(i)) for i in dataset.indexes]
    if not factors[0] or any(other != factors[0] for other in factors):
        return Overviews()
    if dataset.tags().get("OVR_RESAMPLING_ALG", "").upper().startswith("NEAR"):
        said = "its overviews are single pixels (NEAREST): values are read without them"
        return Overviews(factors[0], averaged=False, notes=(said,))
    return Overviews(factors[0])
