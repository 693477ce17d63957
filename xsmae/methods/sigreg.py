"""SIGReg with pixels (Balestriero & LeCun 2025, LeJEPA): no teacher, no negatives.

For comparison. Hidden patches of two views are reconstructed. The embeddings of both,
and of local crops of view 1, agree and are distributed like a normal distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from xsmae import losses
from xsmae.methods import mae
from xsmae.methods.method import Method, reconstruction_per_view
from xsmae.models.build import Config, build_mae
from xsmae.models.mae import Views
from xsmae.models.scale_distill import CoarseViews
from xsmae.models.sigreg import Projector, SIGRegMAE, SIGRegOutput
from xsmae.ranges import LARGE, SMALL

if TYPE_CHECKING:
    from xsmae.methods.method import Terms

UNITS = {
    **mae.UNITS,
    "invariance": "mean squared error",
    "sigreg": "samples x squared difference",
}
RANGES = {
    **mae.RANGES,
    "views.area2": (SMALL, 1),
    "model.local_crops": (0, LARGE),
    "model.local_scale": (SMALL, 1),
    "model.local_area": (SMALL, 1),
    "model.projection_hidden_dim": (1, LARGE),
    "model.projection_dim": (1, LARGE),
    "model.directions": (1, LARGE),
    "loss.invariance.weight": (0, LARGE),
    "loss.sigreg.weight": (0, LARGE),
}


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """View 2, the local crops, the projector, and the three loss terms."""
    return {
        "views": {
            "area2": (0.25, 0.75),  # view 2, as a fraction of view 1
            "view2_from": "view1",  # pixels it is cut from
            "view2_box": "batch",  # one box per ...
            "interpolation2": "bilinear",  # of view 2
        },
        "model": {
            "mask_ratio": 0.55,
            "encoder_norm": False,
            "local_crops": 4,  # boxes of view 1 that the encoder reads whole; 0: none
            # The side of a local crop / the side of view 1, rounded to whole patches.
            "local_scale": 0.375,
            # The box of a local crop in view 1, as a fraction of its area. No crop is
            # enlarged, so a box has at least the area local_scale * local_scale.
            "local_area": (0.15, 0.4),
            "projection_hidden_dim": 512,  # width of the projector's hidden layers
            "projection_dim": 32,  # numbers that an embedding is projected to
            # Random directions, new in every step, along which `sigreg` compares.
            "directions": 256,
        },
        "loss": {
            "reconstruction": {
                "weight": 1.0,
                "norm_pix_loss": False,  # targets normalised per patch
            },
            "invariance": {"weight": 0.95},  # 1 - l, with l = 0.05
            "sigreg": {"weight": 0.05},  # l; 0.02 to 0.05 are usual
        },
        "optim": {"learning_rate": 5e-5},
    }


def build(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> SIGRegMAE:
    """Builds the MAE, the local crops of views of `view_size` pixels, the projector."""
    network = build_mae(model, channels=channels, view_size=view_size, rngs=rngs)
    patch, local = model["patch_size"], None
    if model["local_crops"]:
        side = patch * max(1, round(model["local_scale"] * view_size / patch))
        sides = (side,) * model["local_crops"]
        local = CoarseViews(sides, tuple(model["local_area"]))
    projector = Projector(
        model["embed_dim"],
        model["projection_hidden_dim"],
        model["projection_dim"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    return SIGRegMAE(network, local, projector, model["directions"])


def sigreg_losses(
    output: SIGRegOutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """Reconstruction of both views, agreement of all, and the normal distribution."""
    per_view = reconstruction_per_view(output, views, model=model, loss=loss)
    terms = {
        "reconstruction": losses.over_views(per_view, "mean"),
        "invariance": losses.invariance(output.projected),
        "sigreg": losses.sigreg(output.projected, output.directions),
    }
    return terms, {
        "reconstruction_view1": per_view[0],
        "reconstruction_view2": per_view[1],
    }


SIGREG = Method(
    num_views=2,
    presets=("recommended",),
    fields=fields,
    build=build,
    losses=sigreg_losses,
    pictures=mae.mae_pictures,
    units=UNITS,
    ranges=RANGES,
)
