"""Cross-scale distillation: coarse views learn what the fine view of a place shows.

Our own method. As in Cross-Scale MAE (Tang et al. 2023), hidden patches of view 1 are
reconstructed, and views 1 and 2 attract each other. Instead of the cross-prediction,
views that are coarser than view 1 learn its embedding, and not the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from xsmae import losses
from xsmae.methods import mae
from xsmae.methods.method import Method, Pictures, reconstruction_per_view
from xsmae.models.build import Config, build_mae
from xsmae.models.mae import Views
from xsmae.models.scale_distill import (
    TEACHERS,
    CoarseViews,
    PatchPredictor,
    ScaleDistill,
    ScaleDistillOutput,
    Teacher,
)
from xsmae.ranges import BELOW_1, LARGE, SMALL

if TYPE_CHECKING:
    from xsmae.methods.method import Terms

UNITS = {
    **mae.UNITS,
    "contrastive": "nats",
    "scale_distillation": "nats",
    "dense_distillation": "1 - cosine",
}
RANGES = {
    **mae.RANGES,
    "views.area2": (SMALL, 1),
    "model.coarse_scales": (SMALL, 1),
    "model.coarse_area": (SMALL, 1),
    "model.teacher_momentum": (0, BELOW_1),
    "loss.contrastive.weight": (0, LARGE),
    "loss.contrastive.temperature": (SMALL, LARGE),
    "loss.contrastive.groups": (1, LARGE),
    "loss.scale_distillation.weight": (0, LARGE),
    "loss.scale_distillation.temperature": (SMALL, LARGE),
    "loss.dense_distillation.weight": (0, LARGE),
}


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """View 2, the coarse views and their teacher, and the four loss terms."""
    return {
        "views": {
            "area2": (0.25, 0.75),  # view 2, as a fraction of view 1
            "view2_from": "view1",  # pixels it is cut from
            "view2_box": "batch",  # one box per ...
            "interpolation2": "bilinear",  # of view 2
        },
        "model": {
            "encoder_norm": False,
            # The side of each coarse view / the side of view 1, rounded to whole
            # patches. A view of a half costs as much as view 1 and helps less than the
            # steps that it takes: docs/study.md.
            "coarse_scales": (0.25, 0.125),
            # The box of a coarse view in view 1, as a fraction of its area.
            "coarse_area": (1.0, 1.0),
            # What coarse views learn: `view1`, its visible tokens; `ema`, all of view 1
            # as a moving average of the encoder sees it.
            "teacher": "view1",
            "teacher_momentum": 0.99,  # of `ema`, per step
        },
        "loss": {
            "reconstruction": {
                "weight": 1.0,
                "norm_pix_loss": False,  # targets normalised per patch
            },
            "contrastive": {
                "weight": 1.0,
                "temperature": 0.1,
                "positive_in_denominator": False,  # of the softmax
                # Negatives come from the sample's own n-th part of the batch.
                "groups": 1,
            },
            "scale_distillation": {"weight": 0.5, "temperature": 0.1},
            "dense_distillation": {"weight": 0.0},
        },
        "optim": {"learning_rate": 5e-5},
    }


def build(
    model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs
) -> ScaleDistill:
    """Builds the MAE, and the coarse views of view 1 of `view_size` pixels."""
    if model["teacher"] not in TEACHERS:
        raise ValueError(f"teacher={model['teacher']!r}, expected one of {TEACHERS}")
    network = build_mae(model, channels=channels, view_size=view_size, rngs=rngs)
    coarse = CoarseViews(sides_of(model, view_size), tuple(model["coarse_area"]))
    dtype = jnp.dtype(model["dtype"])
    predictor = PatchPredictor(model["embed_dim"], dtype=dtype, rngs=rngs)
    teacher = None
    if model["teacher"] == "ema":
        teacher = Teacher(network.encoder, model["teacher_momentum"])
    return ScaleDistill(network, coarse, predictor, teacher)


def sides_of(model: Config, view_size: int) -> tuple[int, ...]:
    """The side of each coarse view in pixels: whole patches, at least one.

    Raises ValueError if there is none, or if one is as large as view 1.
    """
    patch = model["patch_size"]
    sides = tuple(
        patch * max(1, round(scale * view_size / patch))
        for scale in model["coarse_scales"]
    )
    if not sides or max(sides) > view_size:
        raise ValueError(
            f"coarse_scales={model['coarse_scales']}, expected one or more, up to 1"
        )
    return sides


def scale_distill_losses(
    output: ScaleDistillOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """Reconstruction of view 1, attraction of view 2, distillation to coarse views."""
    per_view = reconstruction_per_view(output, _view1(views), model=model, loss=loss)
    contrastive = loss["contrastive"]
    terms = {
        "reconstruction": per_view[0],
        "contrastive": losses.contrastive(
            output.embedding,
            temperature=contrastive["temperature"],
            positive_in_denominator=contrastive["positive_in_denominator"],
            groups=contrastive["groups"],
        ),
        "scale_distillation": losses.scale_distillation(
            output.coarse,
            output.target,
            temperature=loss["scale_distillation"]["temperature"],
            positive_in_denominator=contrastive["positive_in_denominator"],
            groups=contrastive["groups"],
        ),
        "dense_distillation": losses.dense_distillation(
            output.coarse_patches, output.target_patches, output.counts
        ),
    }
    return terms, {}


def scale_distill_pictures(
    output: ScaleDistillOutput, views: Views, *, model: Config, loss: Config
) -> Pictures:
    """The reconstruction of view 1."""
    return mae.mae_pictures(output, _view1(views), model=model, loss=loss)


def _view1(views: Views) -> Views:
    return Views(
        images=views.images[:, :1],
        gsd=views.gsd[:, :1],
        box=views.box[:, :1],
        valid=None if views.valid is None else views.valid[:, :1],
    )


SCALE_DISTILL = Method(
    num_views=2,
    presets=("recommended",),
    fields=fields,
    build=build,
    losses=scale_distill_losses,
    pictures=scale_distill_pictures,
    units=UNITS,
    ranges=RANGES,
)
