"""Resizes batches of images on the device, with PyTorch's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float


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
    start = np.arange(new) * old // new
    stop = -(-np.arange(1, new + 1) * old // new)
    at = np.arange(old)
    covered = (at >= start[:, None]) & (at < stop[:, None])
    return (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)
