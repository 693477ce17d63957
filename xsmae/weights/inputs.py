"""Checks the images and GSDs that an encoder gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.bands import Bands
from xsmae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


def check_images(
    images: Shaped[np.ndarray, "batch height width bands"], bands: Bands
) -> Float[np.ndarray, "batch height width bands"]:
    """Images as float32 values; raises UserError.

    8-bit bands take uint8, or floating numbers in 0-1. Bands of rasters take floating
    numbers in their units.
    """
    if images.ndim != 4 or images.shape[-1] != len(bands.names):
        raise UserError(
            f"images of shape {images.shape}, expected [batch, height, width, "
            f"{len(bands.names)}] with the bands {', '.join(bands.names)} in this order"
        )
    if not images.size:
        raise UserError(f"images of shape {images.shape}, expected at least one image")
    if bands.dtype != "uint8":
        return _check_values(images, bands)
    if images.dtype == bands.dtype:
        return bands.rescale(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"images of dtype {images.dtype}, expected uint8 (0-255) or floating "
            "numbers in 0-1"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images with values from {low:g} to {high:g}, expected uint8 (0-255) "
            "or floating numbers in 0-1, not normalised"
        )
    return images.astype(np.float32)


def _check_values(
    images: Shaped[np.ndarray, "batch height width bands"], bands: Bands
) -> Float[np.ndarray, "batch height width bands"]:
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"images of dtype {images.dtype}, expected float32 ({bands.units})"
        )
    if not np.isfinite(images).all():
        raise UserError(
            f"images with NaN or infinity, expected finite float32 ({bands.units}): "
            "fill pixels without a value, for example with the mean of their band"
        )
    return images.astype(np.float32)


def check_patches(images: np.ndarray, patch_size: int) -> None:
    """Raise UserError unless height and width are multiples of the patch size."""
    height, width = images.shape[1:3]
    if height % patch_size or width % patch_size:
        raise UserError(
            f"images of {height}x{width} px, expected multiples of the patch size "
            f"{patch_size}: resize or crop them"
        )


def check_gsd(gsd: Any, batch: int) -> Float[np.ndarray, "batch 2"]:
    """Metres per pixel (y, x) per image, from one number, [batch] or [batch, 2]."""
    try:
        gsd = np.asarray(gsd, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"gsd={gsd!r}, expected metres per pixel above 0") from None
    wrong = gsd[~(np.isfinite(gsd) & (gsd > 0))]
    if wrong.size:
        raise UserError(f"gsd={wrong[0]:g}, expected metres per pixel above 0")
    try:
        per_axis = gsd[:, None] if gsd.ndim == 1 else gsd
        return np.broadcast_to(per_axis, (batch, 2))
    except ValueError:
        raise UserError(
            f"gsd of shape {gsd.shape} for {batch} images, expected one number, "
            f"[{batch}] or [{batch}, 2]"
        ) from None
