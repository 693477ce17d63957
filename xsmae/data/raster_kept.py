"""Windows that share blocks: read together, decoded once, kept until they are wanted.

GDAL decodes a whole block for any pixel of it. A block of 512 px holds four windows of
256 px, and a row of strips holds all windows of its rows. So the windows of a group are
read in one go, a few rows of blocks at a time, and every block is decoded once.

Their numbers are kept as they are stored, half the memory of float32, with masks and
alpha. Each process keeps at most MAX_BYTES and forgets the least recently used.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xsmae.data import gdal
from xsmae.data.gdal import Name
from xsmae.data.raster_pixels import PIECE, Region
from xsmae.data.raster_validity import Validity
from xsmae.errors import BadImageError

if TYPE_CHECKING:
    import rasterio

MAX_BYTES = 32 * 2**20  # a group of 8 windows of 256 px, 4 bands and 16 bits has 4 MB
LARGEST = MAX_BYTES // 2  # of a group; larger ones are read window by window


class Key(NamedTuple):
    """Which window: its dataset, the bands that are read and its pixels."""

    name: Name
    indexes: tuple[int, ...]
    box: Region


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The numbers of a window; it has those members of a dataset that reading needs.

    box: top, left, height, width. shape, block_shapes: of the dataset. numbers: [bands,
    height, width]. masks: of GDAL's bands. alpha: [height, width] or None.
    """

    box: Region
    shape: tuple[int, int]
    block_shapes: tuple[tuple[int, int], ...]
    numbers: np.ndarray
    masks: dict[int, np.ndarray]
    alpha: np.ndarray | None

    @property
    def height(self) -> int:
        """Of the raster."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Of the raster."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    def read(
        self, indexes: int | Sequence[int], window: rasterio.windows.Window
    ) -> np.ndarray:
        """All bands of a part of the window, or alpha where `indexes` is a number."""
        place = self._place(window)
        return (self.alpha if isinstance(indexes, int) else self.numbers)[place]

    def read_masks(
        self,
        index: int,
        window: rasterio.windows.Window,
        out_shape: tuple[int, int],
    ) -> np.ndarray:
        """A mask of a part of the window."""
        return self.masks[index][self._place(window)].reshape(out_shape)

    def _arrays(self) -> list[np.ndarray]:
        alpha = [] if self.alpha is None else [self.alpha]
        return [self.numbers, *self.masks.values(), *alpha]

    def _place(self, window: rasterio.windows.Window) -> tuple:
        top, left = window.row_off - self.box[0], window.col_off - self.box[1]
        return ..., slice(top, top + window.height), slice(left, left + window.width)


class Windows:
    """The windows that one process keeps, the least recently used ones first."""

    def __init__(self):
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.windows: collections.OrderedDict[Key, Kept] = collections.OrderedDict()
        self.nbytes = 0
        self.reading: dict[Key, threading.Lock] = {}  # by the first window of a group

    def find(self, key: Key) -> Kept | None:
        """A window that is kept; it counts as used."""
        with self.lock:
            if key in self.windows:
                self.windows.move_to_end(key)
            return self.windows.get(key)

    def put(self, key: Key, kept: Kept) -> None:
        """Keep a window, and forget others where there are too many bytes."""
        with self.lock:
            self._forget(key)
            self.windows[key] = kept
            self.nbytes += kept.nbytes
            while self.nbytes > MAX_BYTES:
                self._forget(next(iter(self.windows)))

    def forget(self, path: str) -> None:
        """Forget the windows of a raster."""
        with self.lock:
            for key in [key for key in self.windows if key.name.path == path]:
                self._forget(key)

    def _forget(self, key: Key) -> None:
        old = self.windows.pop(key, None)
        self.nbytes -= 0 if old is None else old.nbytes

    def reader(self, group: Key) -> threading.Lock:
        """The lock of those who read a group, so that only one thread does."""
        with self.lock:
            return self.reading.setdefault(group, threading.Lock())

    def done(self, group: Key) -> None:
        """The group has been read."""
        with self.lock:
            self.reading.pop(group, None)


_windows = Windows()
_inherited: list[Windows] = []  # of parents, whose locks another thread may have held


def windows_here() -> Windows:
    """The windows of this process; a fork begins without any."""
    global _windows
    if _windows.pid != os.getpid():
        _inherited.append(_windows)
        _windows = Windows()
    return _windows


def kept_window(
    name: Name,
    box: Region,
    group: Sequence[Region],
    indexes: tuple[int, ...],
    validity: Validity,
) -> Kept | None:
    """A window at full resolution, read with those of its group.

    None if it is better read alone: it is not in the group, the group is too large to
    keep, or a part of it cannot be read. The caller then meets the error, if it is in
    this window.
    """
    if box not in group:
        return None
    place = group.index(box)
    keys = [Key(name, indexes, other) for other in group]
    here = windows_here()
    found = here.find(keys[place])
    if found is not None:
        return found
    with here.reader(keys[0]):
        try:
            found = here.find(keys[place])
            if found is not None:
                return found
            with gdal.borrowed(name) as dataset:
                if _bytes(dataset, group, indexes) > LARGEST:
                    return None
                read = read_group(dataset, group, indexes, validity)
            for key, kept in zip(keys, read, strict=True):
                here.put(key, kept)
            return read[place]
        except BadImageError:
            return None
        finally:
            here.done(keys[0])


def _bytes(
    dataset: rasterio.DatasetReader, group: Sequence[Region], indexes: Sequence[int]
) -> int:
    pixels = sum(height * width for _, _, height, width in group)
    return pixels * sum(np.dtype(dataset.dtypes[i - 1]).itemsize for i in indexes)


def read_group(
    dataset: rasterio.DatasetReader,
    group: Sequence[Region],
    indexes: Sequence[int],
    validity: Validity,
) -> list[Kept]:
    """The windows of a group, each block decoded once if GDAL's cache holds a piece."""
    from rasterio.windows import Window

    masks = validity.masks[:1] if validity.shared else validity.masks
    alone = [] if validity.alpha is None else [validity.alpha]
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in group]
    for begin, end in _rows(dataset, group, indexes):
        for found, (top, left, height, width) in zip(parts, group, strict=True):
            first, last = max(begin, top), min(end, top + height)
            if first < last:
                window = Window(left, first, width, last - first)
                numbers = dataset.read(list(indexes), window=window)
                others = [dataset.read_masks(index, window=window) for index in masks]
                others += [dataset.read(index, window=window) for index in alone]
                found.append((numbers, *others))
    read = []
    for box, found in zip(group, parts, strict=True):
        numbers, *others = (
            arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2)
            for arrays in zip(*found, strict=True)
        )
        read.append(
            Kept(
                box=box,
                shape=dataset.shape,
                block_shapes=tuple(dataset.block_shapes),
                numbers=numbers,
                masks=dict(zip(masks, others, strict=False)),
                alpha=others[-1] if alone else None,
            )
        )
    return read


def _rows(
    dataset: rasterio.DatasetReader, group: Sequence[Region], indexes: Sequence[int]
) -> list[tuple[int, int]]:
    """The rows of a group in pieces of whole rows of blocks, first and last + 1."""
    block, across = dataset.block_shapes[indexes[0] - 1]
    top = min(box[0] for box in group)
    bottom = max(box[0] + box[2] for box in group)
    left = min(box[1] for box in group) // across * across
    right = -(-max(box[1] + box[3] for box in group) // across) * across
    step = max(PIECE // ((right - left) * len(indexes)) // block, 1) * block
    edges = [top, *range(top // step * step + step, bottom, step), bottom]
    return list(itertools.pairwise(edges))
