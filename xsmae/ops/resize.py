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
