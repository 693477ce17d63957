"""Resizes a whole image: cuts its largest central square and averages by area."""

from __future__ import annotations

import numpy as np
from PIL import Image

from xsmae.data.records import Record
from xsmae.errors import BadImageError

# Result rows contain this text. Pillow's BOX gives all source pixels of an output pixel
# the same weight; this is exact if the sides divide. When enlarging it would repeat
# pixels, so bicubic is used there.
RESIZE = "area-averaged (Pillow BOX); bicubic where enlarged"
RESIZE_RASTER = (
    f"{RESIZE}; beside pixels without a value the mean of the others, bilinear where "
    "enlarged; without a value if they are less than half"
)


def filled(record: Record) -> np.ndarray:
    """The image, with the mean of its band where a pixel has no value."""
    if record.valid is None or record.valid.all():
        return record.image
    mean = record.image[record.valid].mean(axis=0, dtype=np.float64)
    return np.where(record.valid[..., None], record.image, np.float32(mean))


def marked(record: Record) -> np.ndarray:
    """The image of a raster with NaN where a pixel has no value; others unchanged."""
    if record.valid is None or record.valid.all():
        return record.image
    return np.where(record.valid[..., None], record.image, np.float32(np.nan))


def square(image: np.ndarray, gsd: float, size: int) -> tuple[np.ndarray, float]:
    """The largest central square, resized as `RESIZE` says, and its GSD.

    image: [height, width, bands], uint8, or floating-point numbers, which become
    float32. NaN marks pixels without a value, see `_of_valid`. gsd: metres per pixel,
    or an array of (y, x). Raises BadImageError if no pixel of the square has a value.
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
            inside = image[top : top + side, left : left + side]
            valid = ~np.isnan(inside).any(axis=-1)
            if not valid.all():
                return _of_valid(inside, valid, size), gsd * side / size
        parts = [_resize(image[..., band], size, box) for band in range(bands)]
        resized = np.stack(parts, axis=-1)
        if image.dtype != np.uint8:
            # Bicubic overshoots, and uint8 is clipped too. Values of rasters may lie
            # outside 0-1.
            low, high = min(image.min(), 0), max(image.max(), 1)
            resized = resized.clip(low, high)
    return resized, gsd * side / size


def central(
    image: np.ndarray, gsd: float, size: int, *, resized: int
) -> tuple[np.ndarray, float]:
    """The central `size` pixels of the largest central square, and its GSD.

    The square is resized to `resized` pixels first, bicubic with antialiasing. Of
    square images it is what Resize and CenterCrop of torchvision give for PIL images.
    image: uint8 [height, width, 3]. gsd: see `square`.
    """
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    bicubic = Image.Resampling.BICUBIC
    whole = _resize(image, resized, box, bicubic, shrink=bicubic)
    first = round((resized - size) / 2)
    part = slice(first, first + size)
    return whole[part, part], gsd * side / resized


def _of_valid(image: np.ndarray, valid: np.ndarray, size: int) -> np.ndarray:
    """`image` [side, side, bands] resized by its valid pixels; NaN where there are few.

    A pixel has a value if at least half of its weight has, as in training. If none has
    so much, those with the most count: an image can be used at every size or at none.
    """
    if not valid.any():
        raise BadImageError("no pixel of its central square has a value")
    box = (0, 0, *valid.shape)
    # Bicubic has negative weights, which would invent values beside the gap.
    enlarge = Image.Resampling.BILINEAR
    weight = _resize(valid.astype(np.float32), size, box, enlarge)
    known = np.where(valid[..., None], image, 0)
    parts = [
        _resize(known[..., band], size, box, enlarge) for band in range(image.shape[-1])
    ]
    kept = weight >= min(0.5, weight.max())
    safe = np.where(kept, weight, np.float32(1))[..., None]
    nothing = np.float32(np.nan)
    return np.where(kept[..., None], np.stack(parts, axis=-1) / safe, nothing)


def _resize(
    image: np.ndarray,
    size: int,
    box: tuple[int, int, int, int],
    enlarge: Image.Resampling = Image.Resampling.BICUBIC,
    shrink: Image.Resampling = Image.Resampling.BOX,
) -> np.ndarray:
    side = box[2] - box[0]
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (size, size),
        shrink if size <= side else enlarge,
        box=box,
        reducing_gap=None,  # resize in one step, without a coarser first reduction
    )
    return np.asarray(resized)
