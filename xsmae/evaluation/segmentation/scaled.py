"""Images with masks at a percentage of their size."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.mask_classes import IGNORE
from xsmae.data.masks import Segmentation
from xsmae.data.raster_resample import Resampled, weights
from xsmae.evaluation.segmentation.crops import Labelled

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped, UInt8

RESIZE = "area-averaged over valid pixels; linear where enlarged"


@dataclasses.dataclass(frozen=True)
class ScaledImage:
    """A `crops.Labelled`; its mask may have the size of the image before resizing."""

    image: Shaped[np.ndarray, "height width bands"]
    mask: UInt8[np.ndarray, ...]
    gsd: Float[np.ndarray, " 2"]
    valid: Bool[np.ndarray, "height width"] | None


class Scaled:
    """The images of `source` at `percent` of their size.

    gsd: `true` for the GSD after resizing, `fixed` for that of 100 %. whole_masks: True
    keeps masks at full size, for the test; else the nearest pixel is taken.
    """

    def __init__(
        self,
        source: Segmentation,
        percent: float,
        *,
        gsd: str = "true",
        whole_masks: bool = False,
    ):
        self._source, self._percent = source, percent
        self._fixed, self._whole_masks = gsd == "fixed", whole_masks

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Labelled:
        record = self._source[index]
        if self._percent == 100:
            return record
        sides = record.mask.shape
        scaled = [max(round(side * self._percent / 100), 1) for side in sides]
        image, valid = _resized(record.image, record.valid, scaled)
        mask = record.mask
        if not self._whole_masks:
            mask = mask[np.ix_(*map(nearest, scaled, sides))]
            mask = np.where(valid, mask, np.uint8(IGNORE))
        gsd = np.broadcast_to(np.float32(record.gsd), 2)
        if not self._fixed:
            gsd = (gsd * np.divide(sides, scaled)).astype(np.float32)
        return ScaledImage(image, mask, gsd, None if record.valid is None else valid)


def nearest(size: int, side: int) -> Int[np.ndarray, " size"]:
    """The pixels of an axis of `side` under the centres of those of one of `size`."""
    places = np.floor((np.arange(size) + 0.5) * side / size).astype(int)
    return np.clip(places, 0, side - 1)


def _resized(image, valid, shape):
    known = np.ones(image.shape[:2], bool) if valid is None else valid
    rows, columns = (
        weights(0, side, size)[0]
        for side, size in zip(image.shape[:2], shape, strict=True)
    )
    resampled = Resampled(rows, columns, image.shape[-1])
    resampled.add(0, np.where(known[..., None], image, 0).astype(np.float32), known)
    values, valid = resampled.result()
    if image.dtype == np.uint8:
        return np.rint(values).clip(0, 255).astype(np.uint8), valid
    return values, valid
