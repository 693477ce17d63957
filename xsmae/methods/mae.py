"""MAE (He et al. 2022): reconstructs the hidden patches of one view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from einops import rearrange

from xsmae import losses
from xsmae.methods.method import (
    Method,
    Pictures,
    grid_of,
    hidden_values,
    neutral_where_invalid,
    patches_of,
    reconstruction_per_view,
    valid_pixels_of,
)
from xsmae.models.build import Config, build_mae
from xsmae.models.mae import MAEOutput, Views
from xsmae.models.vit import unpatchify
from xsmae.ranges import LARGE

if TYPE_CHECKING:
    from xsmae.methods.method import Terms

UNITS = {"reconstruction": "mean squared error"}
RANGES = {"loss.reconstruction.weight": (0, LARGE)}


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """MAE adds only its loss term."""
    return {"loss": {"reconstruction": {"weight": 1.0, "norm_pix_loss": True}}}


def mae_losses(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """The reconstruction loss of the view; SatMAE's if there are groups of bands."""
    per_view = reconstruction_per_view(output, views, model=model, loss=loss)
    return {"reconstruction": per_view[0]}, {}


def mae_pictures(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Pictures:
    """The prediction in place of the hidden patches, in image space.

    With `norm_pix_loss`, the prediction lacks each patch's mean and standard deviation.
    They are taken from the true patch. Pixels that are not valid show the bands' mean.
    """
    grid, patch = grid_of(views, model), model["patch_size"]
    pred = output.pred.astype(jnp.float32)
    if loss["reconstruction"]["norm_pix_loss"]:
        mean, std = losses.patch_statistics(
            patches_of(views.images, patch), valid=valid_pixels_of(views, model)
        )
        pred = pred * std + mean
    pred = unpatchify(rearrange(pred, "b v ... -> (b v) ..."), patch, grid)
    pred = pred.reshape(views.images.shape)
    hidden = hidden_values(output.mask, views, model)
    shown = jnp.where(hidden, pred, views.images)
    shown = neutral_where_invalid(shown, views.valid)
    return Pictures(views.images, hidden, (shown,), ("prediction",))


MAE = Method(
    num_views=1,
    presets=("published",),
    fields=fields,
    build=build_mae,
    losses=mae_losses,
    pictures=mae_pictures,
    units=UNITS,
    ranges=RANGES,
)
