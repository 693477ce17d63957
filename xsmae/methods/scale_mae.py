"""Scale-MAE (Reed et al. 2023): predicts two frequency bands of a larger image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from xsmae import losses
from xsmae.methods.method import (
    Method,
    Pictures,
    grid_of,
    hidden_values,
    neutral_where_invalid,
)
from xsmae.models.build import Config, build_decoder, build_encoder
from xsmae.models.mae import MAE, MAEOutput, Views
from xsmae.models.scale_mae import ScaleHead, combine, low_pass
from xsmae.ops import resize
from xsmae.ranges import LARGE, SMALL

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from xsmae.methods.method import Terms

UNITS = {
    "low_frequency": "squared error, sum over bands",
    "high_frequency": "error, sum over bands",
}
RANGES = {
    "model.target_scale": (1, LARGE),
    "model.head_dim": (4, LARGE),
    "model.head_depth": (0, LARGE),
    "loss.low_frequency.weight": (0, LARGE),
    "loss.low_frequency.through": (0, LARGE),
    "loss.high_frequency.weight": (0, LARGE),
    "loss.high_frequency.cutoff": (SMALL, 1),
}


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The head that predicts the larger image, and its two loss terms."""
    return {
        "model": {
            "position": "gsd",
            "decoder_depth": 3,
            "target_scale": 2,  # side of the predicted image / side of the view
            "head_dim": 64 if size == "tiny" else 512,  # channels; official: 512
            "head_depth": 2,  # convolutional blocks of a head
            "independent_heads": True,  # one for each frequency band
            "progressive": False,  # the finer map continues from the coarser
        },
        "loss": {
            "low_frequency": {
                "weight": 1.0,
                # Side in pixels that the low band's target is first averaged to; 0: not
                # averaged. The official code does this if its second band_config is
                # 224.
                "through": 0,
            },
            "high_frequency": {
                "weight": 1.0,
                "absolute": True,  # L1; False: L2
                # Side of the low-pass image / side of the target; official: 14 / 448.
                "cutoff": 1 / 32,
            },
        },
    }


def build(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> MAE:
    """Builds an MAE whose decoder predicts two frequency bands of a larger image."""
    head = ScaleHead(
        embed_dim=model["decoder_embed_dim"],
        width=model["head_dim"],
        depth=model["head_depth"],
        patch_size=model["patch_size"],
        target_scale=model["target_scale"],
        channels=channels,
        independent_heads=model["independent_heads"],
        progressive=model["progressive"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    decoder = build_decoder(model, head, rngs, use_cls_token=False)
    encoder = build_encoder(model, channels=channels, rngs=rngs)
    return MAE(encoder, decoder, mask_ratio=model["mask_ratio"])


@dataclasses.dataclass(frozen=True)
class FrequencyTargets:
    """The targets of Scale-MAE's two heads, and the side of the low-pass image.

    low_valid, high_valid: the valid pixels of the two; None: all are.
    """

    low: Float[Array, "batch views half_height half_width channels"]
    high: Float[Array, "batch views height width channels"]
    cutoff: int
    low_valid: Bool[Array, "batch views half_height half_width"] | None = None
    high_valid: Bool[Array, "batch views height width"] | None = None


def frequencies_of(views: Views, loss: Config) -> FrequencyTargets:
    """Splits the views' target into two bands (official Scale-MAE, forward_loss).

    If some of its pixels are not valid, all means are over those that are.
    """
    target, valid = views.target, views.target_valid
    size = target.shape[2:4]
    half = (size[0] // 2, size[1] // 2)
    through = loss["low_frequency"]["through"]
    # The config gives the cutoff as a fraction of the target's side.
    cutoff = max(1, round(size[0] * loss["high_frequency"]["cutoff"]))
    low, low_valid = target, valid
    for smaller in [(through, through), half] if through else [half]:
        if valid is None:
            low = resize.area(low, smaller)
        else:
            low, low_valid = resize.area_of_valid(low, low_valid, smaller)
    high = target - low_pass(target, cutoff, size, valid)
    return FrequencyTargets(
        low=low,
        high=neutral_where_invalid(high, valid),
        cutoff=cutoff,
        low_valid=low_valid,
        high_valid=valid,
    )


def scale_mae_losses(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """The losses of the two frequency bands of the target (Reed et al. 2023, 3.2)."""
    target, grid = frequencies_of(views, loss), grid_of(views, model)
    terms = {
        "low_frequency": losses.frequency_band(
            output.pred.low,
            target.low,
            output.mask,
            absolute=False,
            grid=grid,
            valid=target.low_valid,
        )[0],
        "high_frequency": losses.frequency_band(
            output.pred.high,
            target.high,
            output.mask,
            absolute=loss["high_frequency"]["absolute"],
            grid=grid,
            valid=target.high_valid,
        )[0],
    }
    return terms, {}


def scale_mae_pictures(
    output: MAEOutput, views: Views, *, model: Config, loss: Config
) -> Pictures:
    """The predicted bands, their sum, and the targets.

    Pixels that are not valid show the bands' mean.
    """
    pred, target = output.pred, frequencies_of(views, loss)
    panels = {
        "low, predicted": pred.low,
        "high, predicted": pred.high,
        "high, true": target.high,
        "sum of both": combine(pred, target.cutoff),
        "target": views.target,
    }
    hidden = hidden_values(output.mask, views, model)
    valid = [target.low_valid, *[target.high_valid] * (len(panels) - 1)]
    shown = tuple(map(neutral_where_invalid, panels.values(), valid))
    return Pictures(views.images, hidden, shown, tuple(panels))


SCALE_MAE = Method(
    num_views=1,
    presets=("published",),
    fields=fields,
    build=build,
    losses=scale_mae_losses,
    pictures=scale_mae_pictures,
    units=UNITS,
    ranges=RANGES,
    target_scale=lambda model: model["target_scale"],
)
