"""Reads all images of a source once and collects statistics about them."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xsmae.data.records import Source, pixel_digest
from xsmae.errors import BadImageError

CHUNK = 256  # most images to read ahead


@dataclasses.dataclass(frozen=True)
class Image:
    """One image that was read.

    shape: height, width. mean, square: the means of the pixels' values and of their
    squares, one number per band, float64. Values of uint8 are in 0-1. Pixels without a
    value do not count. gsd: the geometric mean of its axes.
    """

    index: int
    shape: tuple[int, int]
    gsd: float
    label: int | None
    digest: bytes
    mean: np.ndarray
    square: np.ndarray


@dataclasses.dataclass(frozen=True)
class Survey:
    """The images of a source in order, and id -> reason for those rejected."""

    source: Source
    images: list[Image]
    rejected: dict[str, str]

    def statistics(self, left_out: set[str] = frozenset()) -> tuple[list, list]:
        """Mean and standard deviation of each band, with equal image weights.

        Training draws images, not pixels, so a large image counts as one. left_out: ids
        of images to skip, such as those of the test part.
        """
        counted = [i for i in self.images if self.source.id(i.index) not in left_out]
        mean = np.mean([image.mean for image in counted], axis=0)
        square = np.mean([image.square for image in counted], axis=0)
        return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()

    def classes(self) -> dict[str, int]:
        """The number of images of each class; empty without labels."""
        counts = collections.Counter(image.label for image in self.images)
        return {name: counts[i] for i, name in enumerate(self.source.class_names)}

    def identical(self) -> list[list[str]]:
        """Groups of ids whose images have the same pixels.

        A record that a mix repeats is one image.
        """
        groups = collections.defaultdict(dict)
        for image in self.images:
            groups[image.digest][self.source.id(image.index)] = None
        return [list(ids) for ids in groups.values() if len(ids) > 1]

    def also_in(self, other: Survey) -> list[tuple[str, str]]:
        """Pairs of ids with the same pixels: an image here and one in `other`."""
        there = {i.digest: other.source.id(i.index) for i in reversed(other.images)}
        pairs = {
            self.source.id(image.index): there[image.digest]
            for image in self.images
            if image.digest in there
        }
        return list(pairs.items())


def survey(
    source: Source,
    *,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Survey:
    """Reads every image, or those at `indices`.

    Raises KeyboardInterrupt once `should_stop()` is true.
    """
    indices = range(len(source)) if indices is None else indices
    images, rejected = [], {}
    for done, found in enumerate(_read(source, indices, should_stop), 1):
        if isinstance(found, Image):
            images.append(found)
        else:
            rejected[source.id(found[0])] = found[1]
        progress(done, len(indices))
    return Survey(source, images, rejected)


def _read(
    source: Source, indices: Sequence[int], should_stop: Callable[[], bool]
) -> Iterator[Image | tuple[int, str]]:
    def load(index: int) -> Image | tuple[int, str]:
        try:
            record = source[index]
        except BadImageError as error:
            return index, str(error)
        # One row at a time: in float64, a scene of 100 MB would take 800 MB.
        sums = np.zeros((2, record.image.shape[2]))
        unit = 255.0 if record.image.dtype == np.uint8 else 1.0
        for i, row in enumerate(record.image):
            values = row / unit
            if record.valid is not None:
                values = values[record.valid[i]].astype(np.float64)
            sums += values.sum(axis=0), np.square(values).sum(axis=0)
        count = record.image.shape[0] * record.image.shape[1]
        if record.valid is not None:
            count = max(int(record.valid.sum()), 1)
        mean, square = sums / count
        shape, digest = record.image.shape[:2], pixel_digest(record.image)
        gsd = (
            math.sqrt(math.prod(record.gsd))
            if isinstance(record.gsd, tuple)
            else (record.gsd)
        )
        return Image(index, shape, gsd, record.label, digest, mean, square)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(indices), CHUNK):
            if should_stop():
                raise KeyboardInterrupt
            yield from pool.map(load, indices[start : start + CHUNK])
