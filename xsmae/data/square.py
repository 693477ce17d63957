"""Resizes a whole image: cuts its largest central square and averages by area."""

from __future__ import annotations

import numpy as np
from PIL import Image

from xsmae.data.records import Record

# Result rows contain this text. Pillow's BOX gives all source pixels of an output pixel
# the same weight; this is exact if the sides divide. When enlarging it would repeat
# pixels, so bicubic is used there.
RESIZE = "area-averaged (Pillow BOX); bicubic where enlarged"


def filled(record: Record) -> np.ndarray:
    """The image, with the mean of its band where a pixel has no value."""
    if record.valid is None or record.valid.all():
        return record.image
    mean = record.image[record.valid].mean(axis=0, dtype=np.float64)
    return np.where(record.valid[..., None], record.image, np.float32(mean))


def square(image: np.ndarray, gsd: float, size: int) -> tuple[np.ndarray, float]:
    """The largest central square, resized as `RESIZE` says, and its GSD.

    image: [height, width, bands], uint8, or floating-point numbers, which become
    float32. gsd: metres per pixel, or an array of (y, x).
    """
    height, width, bands = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    if image.dtype == np.uint8 and bands == 3:
        resized = _resize(image, size, box)
    else:
        if image.dtype != np.uint8:
            image = image.astype(np.float32)
        parts = [_resize(image[..., band], size, box) for band in range(bands)]
        resized = np.stack(parts, axis=-1)
        if image.dtype != np.uint8:
            # Bicubic overshoots, and uint8 is clipped too. Values of rasters may lie
            # outside 0-1.
            low, high = min(image.min(), 0), max(image.max(), 1)
            resized = resized.clip(low, high)
    return resized, gsd * side / size


def _resize(image: np.ndarray, size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    side = box[2] - box[0]
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (size, size),
        Image.Resampling.BOX if size <= side else Image.Resampling.BICUBIC,
        box=box,
        reducing_gap=None,  # resize in one step, without a coarser first reduction
    )
    return np.asarray(resized)
