"""The pretraining methods: each is a model, its losses, its views and its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae import losses
from xsmae.models.build import (
    Config,
    build_cross_scale_mae,
    build_mae,
    build_sat_mae,
    build_scale_mae,
    channel_groups,
)
from xsmae.models.cross_scale_mae import CrossScaleMAEOutput
from xsmae.models.mae import MAEOutput, Views
from xsmae.models.scale_mae import combine, low_pass
from xsmae.models.vit import patchify, unpatchify
from xsmae.ops import resize

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    # The terms that the total is made of, and what is only reported.
    Terms = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a figure shows of a batch, in normalised image space.

    images: [batch, views, height, width, channels], what the model was given.
    hidden: of the same shape, whether a value was hidden from the encoder.
    panels: what the model makes of it; images of any size, with their titles.
    """

    images: Float[Array, "batch views height width channels"]
    hidden: Bool[Array, "batch views height width channels"]
    panels: tuple[Float[Array, "batch views tall wide channels"], ...]
    titles: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def mae_losses(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """The reconstruction of the one view; SatMAE's where there are groups."""
    per_view = _reconstruction(output, views, model, loss)
    return {"reconstruction": per_view[0]}, {}


def scale_mae_losses(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """The two frequency bands of the one view's target (Reed et al. 2023, 3.2)."""
    target, grid = frequencies_of(views, loss), _grid(views, model)
    terms = {
        "low_frequency": losses.frequency_band(
            output.pred.low, target.low, output.mask, absolute=False, grid=grid
        )[0],
        "high_frequency": losses.frequency_band(
            output.pred.high,
            target.high,
            output.mask,
            absolute=loss["high_frequency"]["absolute"],
            grid=grid,
        )[0],
    }
    return terms, {}


def cross_scale_mae_losses(
    output: CrossScaleMAEOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """L_re, L_cc and L_cp of Tang et al. 2023, section 3."""
    per_view = _reconstruction(output, views, model, loss)
    aligned = loss["cross_prediction"]["aligned"]
    terms = {
        "reconstruction": losses.over_views(per_view, loss["reconstruction"]["views"]),
        "contrastive": losses.contrastive(
            output.embedding,
            temperature=loss["contrastive"]["temperature"],
            positive_in_denominator=loss["contrastive"]["positive_in_denominator"],
            groups=loss["contrastive"]["groups"],
        ),
        "cross_prediction": losses.cross_prediction(
            output.predicted_tokens,
            output.decoder_tokens[:, 0, 1:],
            stop_gradient=loss["cross_prediction"]["stop_gradient"],
            box=views.box[:, 1] if aligned else None,
            grid=_grid(views, model),
        ),
    }
    return terms, {
        "reconstruction_view1": per_view[0],
        "reconstruction_view2": per_view[1],
    }


def _reconstruction(output, views, model, loss):
    return losses.reconstruction(
        output.pred,
        _patches(views.images, model["patch_size"]),
        output.mask,
        norm_pix_loss=loss["reconstruction"]["norm_pix_loss"],
        channel_groups=channel_groups(model),
        channels=views.images.shape[-1],
    )


def _patches(images, patch_size):
    batch = images.shape[0]
    merged = rearrange(images, "b v ... -> (b v) ...")
    return rearrange(patchify(merged, patch_size), "(b v) ... -> b v ...", b=batch)


def _grid(views: Views, model: Config) -> tuple[int, int]:
    height, width = views.images.shape[2:4]
    return height // model["patch_size"], width // model["patch_size"]


@dataclasses.dataclass(frozen=True)
class FrequencyTargets:
    """What Scale-MAE's two heads should predict, and the low-pass image's side."""

    low: Float[Array, "batch views half_height half_width channels"]
    high: Float[Array, "batch views height width channels"]
    cutoff: int


def frequencies_of(views: Views, loss: Config) -> FrequencyTargets:
    """The two bands of the views' target (official forward_loss of Scale-MAE)."""
    target = views.target
    size = target.shape[2:4]
    half = (size[0] // 2, size[1] // 2)
    through = loss["low_frequency"]["through"]
    low = resize.area(target, (through, through)) if through else target
    # The config has a fraction of the target's side.
    cutoff = max(1, round(size[0] * loss["high_frequency"]["cutoff"]))
    return FrequencyTargets(
        low=resize.area(low, half),
        high=target - low_pass(target, cutoff, size),
        cutoff=cutoff,
    )


def mae_pictures(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Pictures:
    """The prediction in place of the hidden patches, in image space.

    With `norm_pix_loss` the prediction lacks each patch's mean and standard deviation,
    which are taken from the patch that it is of.
    """
    grid, patch = _grid(views, model), model["patch_size"]
    pred = output.pred.astype(jnp.float32)
    if loss["reconstruction"]["norm_pix_loss"]:
        mean, std = losses.patch_statistics(_patches(views.images, patch))
        pred = pred * std + mean
    pred = unpatchify(rearrange(pred, "b v ... -> (b v) ..."), patch, grid)
    pred = pred.reshape(views.images.shape)
    hidden = _hidden(output.mask, views, model)
    shown = jnp.where(hidden, pred, views.images)
    return Pictures(views.images, hidden, (shown,), ("prediction",))


def scale_mae_pictures(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Pictures:
    """The two bands as they are predicted, their sum, and what they should be."""
    pred, target = output.pred, frequencies_of(views, loss)
    panels = {
        "low, predicted": pred.low,
        "high, predicted": pred.high,
        "high, true": target.high,
        "sum of both": combine(pred, target.cutoff),
        "target": views.target,
    }
    hidden = _hidden(output.mask, views, model)
    return Pictures(views.images, hidden, tuple(panels.values()), tuple(panels))


def _hidden(mask, views: Views, model: Config):
    """Whether each value of the images is of a hidden patch."""
    rows, columns = _grid(views, model)
    channels, groups = views.images.shape[-1], channel_groups(model)
    if groups:
        of_band = {band: i for i, group in enumerate(groups) for band in group}
        mask = mask[:, :, jnp.array([of_band[band] for band in range(channels)])]
    else:
        mask = jnp.repeat(mask[:, :, None], channels, axis=2)
    mask = rearrange(mask, "b v c (h w) -> b v h w c", h=rows, w=columns)
    return resize.nearest(mask, views.images.shape[2:4]) > 0.5


@dataclasses.dataclass(frozen=True)
class Method:
    """A model of `Views`, the loss terms of its output by name, and its pictures.

    build(config.model, channels=, view_size=, rngs=) -> the model. losses(output,
    views, model=, loss=) -> the terms, each with a `weight` in `config.loss.<name>`,
    and what is only reported. pictures(output, views, model=, loss=) -> `Pictures`.
    target_scale(config.model) -> how many times the views' size the crops are that
    the model predicts; 1 for a model of what it reads.
    """

    num_views: int
    build: Callable[..., nnx.Module]
    losses: Callable[..., tuple[Terms, Terms]]
    pictures: Callable[..., Pictures] = mae_pictures
    target_scale: Callable[[Config], int] = lambda model: 1


METHODS = {
    "mae": Method(1, build_mae, mae_losses),
    "sat_mae": Method(1, build_sat_mae, mae_losses),
    "scale_mae": Method(
        1,
        build_scale_mae,
        scale_mae_losses,
        pictures=scale_mae_pictures,
        target_scale=lambda model: model["target_scale"],
    ),
    "cross_scale_mae": Method(2, build_cross_scale_mae, cross_scale_mae_losses),
}
