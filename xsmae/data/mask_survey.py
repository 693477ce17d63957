"""Reads all images and masks of a source once: classes, sizes, places, duplicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from xsmae.data.mask_classes import IGNORE
from xsmae.data.masks import Segmentation
from xsmae.data.overlaps import Quadrilateral, overlaps, quadrilateral_of
from xsmae.data.reading import THREADS, Moments, mean_and_std, moments, read_ahead
from xsmae.data.records import pixel_digest
from xsmae.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class MaskImage:
    """One image that was read.

    pixels: int64 [classes + 1], of each class, then of those that do not count. gsd:
    (y, x). moments: of the valid pixels. footprint: None if nobody says where it is.
    """

    index: int
    shape: tuple[int, int]
    gsd: tuple[float, float]
    pixels: np.ndarray
    digest: bytes
    moments: Moments
    footprint: Quadrilateral | None

    @property
    def has_values(self) -> bool:
        """True unless no pixel is valid."""
        return bool(np.isfinite(self.moments.mean).all())


@dataclasses.dataclass(frozen=True)
class MaskSurvey:
    """The images of a source in order, and id -> reason of those that are refused."""

    source: Segmentation
    images: list[MaskImage]
    rejected: dict[str, str]

    def pixels(self) -> np.ndarray:
        """int64 [classes + 1], as `MaskImage.pixels`, of all images."""
        none = np.zeros(len(self.source.class_names) + 1, np.int64)
        return sum((image.pixels for image in self.images), none)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each band, with equal image weights.

        Images without a valid pixel do not count; 0 and 1 if no image has one.
        """
        counted = [image.moments for image in self.images if image.has_values]
        if not counted:
            bands = len(self.source.bands)
            return [0.0] * bands, [1.0] * bands
        return mean_and_std(counted)

    def scenes(self) -> set[str]:
        """The scenes, of refused images too."""
        return {self.source.scene(i) for i in range(len(self.source))}

    def identical(self, other: MaskSurvey) -> list[tuple[str, str]]:
        """Pairs of ids with the same pixels: an image here and one in `other`."""
        there = {i.digest: other.source.id(i.index) for i in reversed(other.images)}
        return [
            (self.source.id(image.index), there[image.digest])
            for image in self.images
            if image.digest in there and image.has_values
        ]

    def footprints(self) -> list[Quadrilateral]:
        """Of the images whose place is known."""
        return [i.footprint for i in self.images if i.footprint is not None]

    def overlaps(self, other: MaskSurvey) -> list[tuple[str, str, float]] | None:
        """Pairs that overlap on the ground, see `overlaps.overlaps`.

        None if no image of a part says where it lies.
        """
        here, there = self.footprints(), other.footprints()
        return overlaps(here, there) if here and there else None


def survey_masks(
    source: Segmentation,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> MaskSurvey:
    """Reads every image with its mask.

    Raises KeyboardInterrupt once `should_stop()` is true.
    """
    images, rejected = [], {}
    for done, found in enumerate(_read(source, should_stop), 1):
        if isinstance(found, MaskImage):
            images.append(found)
        else:
            rejected[source.id(found[0])] = found[1]
        progress(done, len(source))
    return MaskSurvey(source, images, rejected)


def _read(
    source: Segmentation, should_stop: Callable[[], bool]
) -> Iterator[MaskImage | tuple[int, str]]:
    classes = len(source.class_names)

    def load(index: int) -> MaskImage | tuple[int, str]:
        try:
            record = source[index]
        except UserError as error:
            return index, str(error)
        counts = np.bincount(record.mask.ravel(), minlength=IGNORE + 1)
        raster = source.raster(index)
        return MaskImage(
            index,
            record.image.shape[:2],
            record.gsd,
            np.append(counts[:classes], counts[IGNORE]),
            pixel_digest(record.image),
            moments(record.image, record.valid),
            None if raster is None else quadrilateral_of(raster, source.id(index)),
        )

    # Images can be large: no more are read ahead than are worked on.
    everything = range(len(source))
    return read_ahead(load, everything, ahead=THREADS, should_stop=should_stop)
