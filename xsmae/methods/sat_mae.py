"""SatMAE (Cong et al. 2022): an MAE with a token per patch and group of bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from xsmae.methods import mae
from xsmae.methods.method import Method
from xsmae.models.build import (
    Config,
    build_decoder,
    build_encoder,
    build_mae,
    channel_groups,
)
from xsmae.models.mae import MAE
from xsmae.models.sat_mae import GroupHead, SatMAE
from xsmae.ranges import LARGE

RANGES = {
    **mae.RANGES,
    "model.group_dim": (1, LARGE),
    "model.decoder_group_dim": (1, LARGE),
}


def fields(
    preset: str, *, size: str, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The groups of bands, their encoding and their masks."""
    return {
        **mae.fields(preset, size=size, model=model),
        "model": {
            # Groups of bands by index, such as ((0,), (1, 2)), or by name, such as
            # (("red",), ("green", "blue")). Without groups it is the plain MAE, which
            # SatMAE uses for RGB.
            "channel_groups": (),
            # Channels that encode the group; official B and L: 256, decoder 128.
            "group_dim": 256 if model["embed_dim"] >= 768 else model["embed_dim"] // 4,
            "decoder_group_dim": model["decoder_embed_dim"] // 4,  # the same, decoder
            "spatial_mask": False,  # True: one mask for all groups
            # If the groups are not in order, `concatenated` compares a group's
            # prediction with another group's bands, like the official code.
            "band_order": "concatenated",
        },
    }


def build(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> MAE:
    """Builds SatMAE with `channel_groups`, the plain MAE without."""
    groups = channel_groups(model)
    if not groups:
        return build_mae(model, channels=channels, view_size=view_size, rngs=rngs)
    head = GroupHead(
        groups,
        patch_size=model["patch_size"],
        embed_dim=model["decoder_embed_dim"],
        band_order=model["band_order"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    return SatMAE(
        build_encoder(model, channels=channels, rngs=rngs),
        build_decoder(model, head, rngs),
        mask_ratio=model["mask_ratio"],
        spatial_mask=model["spatial_mask"],
    )


SAT_MAE = Method(
    num_views=1,
    presets=("published",),
    fields=fields,
    build=build,
    losses=mae.mae_losses,
    pictures=mae.mae_pictures,
    units=mae.UNITS,
    ranges=RANGES,
)
