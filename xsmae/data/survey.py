"""Reads all images of a source once and collects statistics about them."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.reading import Moments, mean_and_std, moments, read_ahead
from xsmae.data.records import Record, Source, pixel_digest
from xsmae.errors import BadImageError

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 256  # most images to read ahead
PERCENTILES = (2, 50, 98)
# The smallest std of a float32 band: this part of its mean, and this number.
SMALLEST_PART, SMALLEST_STD = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True)
class Image:
    """One image that was read.

    shape: height, width. moments: of the pixels that have a value; valid: the part of
    the pixels that does. gsd: the geometric mean of its axes. sample: float32 [pixels,
    bands], drawn with replacement.
    """

    index: int
    shape: tuple[int, int]
    gsd: float
    label: int | None
    digest: bytes
    moments: Moments
    valid: float
    sample: np.ndarray


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
        return mean_and_std([image.moments for image in self.counted(left_out)])

    def counted(self, left_out: set[str] = frozenset()) -> list[Image]:
        """The images that have valid pixels, without those of the ids `left_out`."""
        return [
            image
            for image in self.images
            if image.valid and self.source.id(image.index) not in left_out
        ]

    def pixels(
        self, left_out: set[str] = frozenset()
    ) -> Float[np.ndarray, "pixels bands"]:
        """Sampled valid pixels, as many from each image."""
        return np.concatenate([image.sample for image in self.counted(left_out)])

    def bands(self, left_out: set[str] = frozenset()) -> dict[str, dict[str, float]]:
        """Band -> min, percentiles, max, mean, std, valid; of images as `statistics`.

        min and max are of all pixels, the percentiles of `pixels`.
        """
        counted = self.counted(left_out)
        mean, std = self.statistics(left_out)
        parts = np.percentile(self.pixels(left_out), PERCENTILES, axis=0).tolist()
        columns = {
            "min": np.min([image.moments.low for image in counted], axis=0).tolist(),
            **{f"p{p}": part for p, part in zip(PERCENTILES, parts, strict=True)},
            "max": np.max([image.moments.high for image in counted], axis=0).tolist(),
            "mean": mean,
            "std": std,
            "valid": [float(np.mean([i.valid for i in counted]))] * len(mean),
        }
        return {
            band: {name: column[place] for name, column in columns.items()}
            for place, band in enumerate(self.source.bands)
        }

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
    pixels: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Survey:
    """Reads every image, or those at `indices`.

    pixels: about how many to sample in total, as many from each image. Raises
    KeyboardInterrupt once `should_stop()` is true.
    """
    indices = range(len(source)) if indices is None else indices
    each = -(-pixels // len(indices)) if len(indices) else 0
    images, rejected = [], {}
    for done, found in enumerate(_read(source, indices, each, should_stop), 1):
        if isinstance(found, Image):
            images.append(found)
        else:
            rejected[source.id(found[0])] = found[1]
        progress(done, len(indices))
    return Survey(source, images, rejected)


def settings_of(
    mean: Sequence[float], std: Sequence[float], dtype: str
) -> dict[str, tuple[float, ...]]:
    """The `mean` and `std` of a config: rounded, and no std of 0.

    Images of one colour have std 0, which would divide by 0.
    """
    if dtype == "uint8":
        smallest = 1 / 255
        return {
            "mean": tuple(round(value, 4) for value in mean),
            "std": tuple(round(max(value, smallest), 4) for value in std),
        }
    # Rasters have any units, and cirrus a std of 0.0004.
    floors = [max(SMALLEST_PART * abs(value), SMALLEST_STD) for value in mean]
    return {
        "mean": tuple(float(f"{value:.6g}") for value in mean),
        "std": tuple(
            float(f"{max(value, floor):.6g}")
            for value, floor in zip(std, floors, strict=True)
        ),
    }


def _read(
    source: Source, indices: Sequence[int], each: int, should_stop: Callable[[], bool]
) -> Iterator[Image | tuple[int, str]]:
    def load(index: int) -> Image | tuple[int, str]:
        try:
            return _image(source[index], index, each)
        except BadImageError as error:
            return index, str(error)

    return read_ahead(load, indices, ahead=CHUNK, should_stop=should_stop)


def _image(record: Record, index: int, each: int) -> Image:
    height, width, bands = record.image.shape
    unit = 255.0 if record.image.dtype == np.uint8 else 1.0
    found = moments(record.image, record.valid)
    # Always the same pixels of an image, whatever else is read.
    picked = np.random.default_rng(index).integers(
        0, found.count, each if found.count else 0
    )
    flat = record.image.reshape(-1, bands)
    if record.valid is not None:
        picked = np.flatnonzero(record.valid)[picked]
    return Image(
        index=index,
        shape=(height, width),
        gsd=math.sqrt(math.prod(record.gsd))
        if isinstance(record.gsd, tuple)
        else record.gsd,
        label=record.label,
        digest=pixel_digest(record.image),
        moments=found,
        valid=found.count / (height * width),
        sample=flat[picked].astype(np.float32) / np.float32(unit),
    )
