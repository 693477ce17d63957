"""Resizes batches of images on the device, with PyTorch's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def area(
    images: Float[Array, "... height width channels"], size: tuple[int, int]
) -> Float[Array, "... new_height new_width channels"]:
    """Resizes to `size` (height, width) by the mean over the pixels under each new one.

    New pixel i covers the old pixels from floor(i * old / new) to ceil((i + 1) * old /
    new) with equal weights, like `torch.nn.functional.interpolate(mode="area")`.
    """
    weight_y, weight_x = (
        _area_weights(old, new)
        for old, new in zip(images.shape[-3:-1], size, strict=True)
    )
    return jnp.einsum("yh,xw,...hwc->...yxc", weight_y, weight_x, images)


def area_of_valid(
    images: Float[Array, "... height width channels"],
    valid: Bool[Array, "... height width"],
    size: tuple[int, int],
) -> tuple[
    Float[Array, "... new_height new_width channels"],
    Bool[Array, "... new_height new_width"],
]:
    """`area` over the valid pixels alone, and which new pixels are valid.

    A new pixel is valid if at least half of the pixels that it covers are; the others
    come out as 0. `images` must be finite and 0 where they are not valid.
    """
    covered = [
        _covered(old, new) for old, new in zip(valid.shape[-2:], size, strict=True)
    ]
    # Counted, not averaged, so that a half is a half in any precision.
    count = jnp.einsum("yh,xw,...hw->...yx", *covered, valid.astype(jnp.float32))
    whole = np.outer(*(axis.sum(axis=1) for axis in covered))
    whole = whole.reshape((1,) * (valid.ndim - 2) + whole.shape)
    valid = 2 * count >= whole
    means = area(images, size) * (whole / jnp.maximum(count, 1))[..., None]
    return jnp.where(valid[..., None], means, 0), valid


def overlaps(
    start: Float[Array, " batch"],
    stop: Float[Array, " batch"],
    old: int,
    new: int,
) -> Float[Array, "batch new old"]:
    """The part of each of `new` equal cells of an interval that each old cell covers.

    The interval is in fractions of an axis of `old` cells. The parts of a cell add up
    to 1 where the interval lies within the axis.
    """
    edges = start[:, None] + (stop - start)[:, None] * (jnp.arange(new + 1) / new)[None]
    edges = edges * old
    at = jnp.arange(old)[None, None]
    low = jnp.maximum(edges[:, :-1, None], at)
    high = jnp.minimum(edges[:, 1:, None], at + 1)
    size = edges[:, 1:, None] - edges[:, :-1, None]
    return jnp.maximum(high - low, 0) / size


def area_of_boxes(
    images: Float[Array, "batch height width channels"],
    box: Float[Array, "batch 4"],
    size: tuple[int, int],
    valid: Bool[Array, "batch height width"] | None = None,
) -> tuple[
    Float[Array, "batch new_height new_width channels"],
    Bool[Array, "batch new_height new_width"] | None,
]:
    """A box of each image at `size` (height, width), by the mean over the area.

    A new pixel is the mean of the old ones that it covers, each weighted by the part
    that is covered: the blur of a sensor with larger pixels. `box` is (top, left,
    bottom, right) as fractions of the image. With `valid`, the mean is over the valid
    pixels. A new pixel is valid if they cover at least half of it; the others are 0.
    """
    height, width = images.shape[1:3]
    down = overlaps(box[:, 0], box[:, 2], height, size[0])
    across = overlaps(box[:, 1], box[:, 3], width, size[1])
    if valid is None:
        return jnp.einsum("byh,bxw,bhwc->byxc", down, across, images), None
    part = jnp.einsum("byh,bxw,bhw->byx", down, across, valid.astype(jnp.float32))
    images = jnp.where(valid[..., None], images, 0)
    means = jnp.einsum("byh,bxw,bhwc->byxc", down, across, images)
    # 1e-4 of a pixel is the rounding of the edges.
    found = part >= 0.5 - 1e-4
    return jnp.where(
        found[..., None], means / jnp.maximum(part, 1e-4)[..., None], 0
    ), found


def bilinear(
    images: Float[Array, "... height width channels"], size: tuple[int, int]
) -> Float[Array, "... new_height new_width channels"]:
    """Interpolates between pixel centres to `size` (height, width), no antialiasing.

    It is `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    shape = (*images.shape[:-3], *size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def nearest(
    images: Float[Array, "... height width channels"], size: tuple[int, int]
) -> Float[Array, "... new_height new_width channels"]:
    """Takes the old pixel at each new pixel's corner, to `size` (height, width)."""
    height, width = images.shape[-3:-1]
    rows = np.arange(size[0]) * height // size[0]
    columns = np.arange(size[1]) * width // size[1]
    return images[..., rows, :, :][..., columns, :]


def _area_weights(old: int, new: int) -> np.ndarray:
    """[new, old] weights of one axis."""
    covered = _covered(old, new)
    return covered / covered.sum(axis=1, keepdims=True)


def _covered(old: int, new: int) -> np.ndarray:
    """[new, old] of one axis: 1 where a new pixel covers an old one."""
    start = np.arange(new) * old // new
    stop = -(-np.arange(1, new + 1) * old // new)
    at = np.arange(old)
    return ((at >= start[:, None]) & (at < stop[:, None])).astype(np.float32)
