"""SimCLR (Chen et al. 2020) on two scales: the contrastive loss alone.

The control that asks whether reconstruction helps. Views and loss are those of
cross-scale distillation; there are no masks and no decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from xsmae import losses
from xsmae.methods.method import Method
from xsmae.models.build import Config, build_encoder
from xsmae.models.cross_scale_mae import ProjectionHead
from xsmae.models.mae import Views
from xsmae.models.simclr import SimCLR, SimCLROutput
from xsmae.ranges import LARGE, SMALL

if TYPE_CHECKING:
    from xsmae.methods.method import Terms

UNITS = {"contrastive": "nats"}
RANGES = {
    "views.area2": (SMALL, 1),
    "model.projection_dim": (0, LARGE),
    "loss.contrastive.weight": (0, LARGE),
    "loss.contrastive.temperature": (SMALL, LARGE),
    "loss.contrastive.groups": (1, LARGE),
}
# Of masks and of a decoder.
UNUSED = (
    "model.mask_ratio",
    "model.decoder_embed_dim",
    "model.decoder_depth",
    "model.decoder_num_heads",
)


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """View 2, the projection head, and the loss term."""
    return {
        "views": {
            "area2": (0.25, 0.75),  # view 2, as a fraction of view 1
            "view2_from": "view1",  # pixels it is cut from
            "view2_box": "batch",  # one box per ...
            "interpolation2": "bilinear",  # of view 2
        },
        "model": {
            "encoder_norm": False,
            "projection_dim": 0,  # 0: no projection head. 128: SimCLR's size.
        },
        "loss": {
            "contrastive": {
                "weight": 1.0,
                "temperature": 0.1,
                "positive_in_denominator": False,  # of the softmax
                # Negatives come from the sample's own n-th part of the batch.
                "groups": 1,
            },
        },
        "optim": {"learning_rate": 5e-5},
    }


def build(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> SimCLR:
    """Builds the encoder and its projection head; `view_size` has no effect."""
    encoder = build_encoder(model, channels=channels, rngs=rngs)
    if not model["projection_dim"]:
        return SimCLR(encoder)
    projection = ProjectionHead(
        model["embed_dim"],
        model["projection_dim"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    return SimCLR(encoder, projection)


def simclr_losses(
    output: SimCLROutput, views: Views, *, model: Config, loss: Config
) -> tuple[Terms, Terms]:
    """Attraction of the two views of a place."""
    contrastive = loss["contrastive"]
    term = losses.contrastive(
        output.embedding,
        temperature=contrastive["temperature"],
        positive_in_denominator=contrastive["positive_in_denominator"],
        groups=contrastive["groups"],
    )
    return {"contrastive": term}, {}


SIMCLR = Method(
    num_views=2,
    presets=("recommended",),
    fields=fields,
    build=build,
    losses=simclr_losses,
    pictures=None,
    units=UNITS,
    ranges=RANGES,
    unused=UNUSED,
)
