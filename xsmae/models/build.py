"""Builds the networks that `config.model` describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from xsmae.errors import UserError
from xsmae.models.mae import MAE, Decoder, PatchHead
from xsmae.models.position import TokenPositions
from xsmae.models.sat_mae import GroupPatchEmbed, check_groups
from xsmae.models.vit import Block, Encoder, PatchEmbed, stacked_blocks

Config = Mapping[str, Any]

# Exported encoders run with these settings, whatever the settings of training.
EXECUTION = {
    "attention": "xla", "remat": "elementwise", "scan": True, "dtype": "float32",
}  # fmt: skip


def build_encoder(model: Config, *, channels: int, rngs: nnx.Rngs) -> Encoder:
    """The encoder that `config.model` describes, for images of `channels` bands."""
    sizes = {"patch_size": model["patch_size"], "embed_dim": model["embed_dim"]}
    dtype = jnp.dtype(model["dtype"])
    groups = channel_groups(model)
    if groups:
        check_groups(groups, channels)
        patch_embed = GroupPatchEmbed(groups, **sizes, dtype=dtype, rngs=rngs)
    else:
        patch_embed = PatchEmbed(channels=channels, **sizes, dtype=dtype, rngs=rngs)
    return Encoder(
        patch_embed,
        build_blocks(model, "", rngs),
        positions=build_positions(model, ""),
        use_norm=model["encoder_norm"],
        rngs=rngs,
        **execution_of(model),
    )


def build_mae(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> MAE:
    """Builds the encoder and the decoder; `view_size` has no effect."""
    head = PatchHead(
        patch_size=model["patch_size"],
        channels=channels,
        embed_dim=model["decoder_embed_dim"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    decoder = build_decoder(model, head, rngs)
    encoder = build_encoder(model, channels=channels, rngs=rngs)
    return MAE(encoder, decoder, mask_ratio=model["mask_ratio"])


def channel_groups(model: Config) -> tuple[tuple[int, ...], ...]:
    """The groups of SatMAE; empty for other methods."""
    return tuple(tuple(group) for group in model.get("channel_groups", ()))


def with_group_indices(model: Config, bands: Sequence[str]) -> Config:
    """`model` with the bands in `channel_groups` by index, where they are named.

    Raises UserError for a name that is none of `bands`.
    """
    if not model.get("channel_groups", ()):
        return model
    names, groups = list(bands), channel_groups(model)
    for band in (band for group in groups for band in group):
        if isinstance(band, str) and band not in names:
            raise UserError(
                f"model.channel_groups={groups} names {band!r}, expected only bands "
                f"of the images: {', '.join(names)}"
            )
    indices = tuple(
        tuple(names.index(band) if isinstance(band, str) else band for band in group)
        for group in groups
    )
    return {**model, "channel_groups": indices}


def build_blocks(model: Config, part: str, rngs: nnx.Rngs) -> Block:
    """The blocks of the encoder (`part=""`) or of the decoder (`part="decoder_"`)."""
    return stacked_blocks(
        model[f"{part}depth"],
        model[f"{part}embed_dim"],
        model[f"{part}num_heads"],
        mlp_ratio=model["mlp_ratio"],
        norm_style=model["norm_style"],
        norm_epsilon=model["norm_epsilon"],
        attention_implementation=model["attention"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )


def build_positions(model: Config, part: str) -> TokenPositions:
    groups = len(channel_groups(model))
    return TokenPositions(
        model[f"{part}embed_dim"],
        position=model["position"],
        reference_gsd=model["reference_gsd"],
        groups=groups,
        group_dim=model[f"{part}group_dim"] if groups else 0,
    )


def build_decoder(
    model: Config, head: nnx.Module, rngs: nnx.Rngs, *, use_cls_token: bool = True
) -> Decoder:
    return Decoder(
        build_blocks(model, "decoder_", rngs),
        head,
        encoder_dim=model["embed_dim"],
        positions=build_positions(model, "decoder_"),
        use_cls_token=use_cls_token,
        rngs=rngs,
        **execution_of(model),
    )


def execution_of(model: Config) -> dict[str, Any]:
    """Settings of how the blocks run; they change numbers only by rounding."""
    dtype = jnp.dtype(model["dtype"])
    return {"remat": model["remat"], "scan": model["scan"], "dtype": dtype}
