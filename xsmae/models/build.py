"""The networks that `config.model` describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from xsmae.models.cross_scale_mae import CrossScaleMAE, Predictor, ProjectionHead
from xsmae.models.mae import MAE, Decoder, PatchHead
from xsmae.models.position import TokenPositions
from xsmae.models.sat_mae import GroupHead, GroupPatchEmbed, SatMAE, check_groups
from xsmae.models.scale_mae import ScaleHead
from xsmae.models.vit import Block, Encoder, PatchEmbed, stacked_blocks

Config = Mapping[str, Any]


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
        _blocks(model, "", rngs),
        positions=_positions(model, ""),
        use_norm=model["encoder_norm"],
        rngs=rngs,
        **_execution(model),
    )


def build_mae(model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs) -> MAE:
    """Encoder and decoder; `view_size` does not matter to them."""
    head = PatchHead(
        patch_size=model["patch_size"],
        channels=channels,
        embed_dim=model["decoder_embed_dim"],
        dtype=jnp.dtype(model["dtype"]),
        rngs=rngs,
    )
    decoder = _decoder(model, head, rngs)
    encoder = build_encoder(model, channels=channels, rngs=rngs)
    return MAE(encoder, decoder, mask_ratio=model["mask_ratio"])


def build_sat_mae(
    model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs
) -> MAE:
    """With `channel_groups` SatMAE's groups of bands; without them the plain MAE."""
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
        _decoder(model, head, rngs),
        mask_ratio=model["mask_ratio"],
        spatial_mask=model["spatial_mask"],
    )


def build_scale_mae(
    model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs
) -> MAE:
    """The MAE whose decoder predicts two frequency bands of a larger image."""
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
    decoder = _decoder(model, head, rngs, use_cls_token=False)
    encoder = build_encoder(model, channels=channels, rngs=rngs)
    return MAE(encoder, decoder, mask_ratio=model["mask_ratio"])


def build_cross_scale_mae(
    model: Config, *, channels: int, view_size: int, rngs: nnx.Rngs
) -> CrossScaleMAE:
    """The MAE and its heads, for views of `view_size` pixels."""
    dtype = jnp.dtype(model["dtype"])
    predictor = Predictor(
        model["decoder_embed_dim"],
        model["predictor_hidden_dim"],
        norm=model["predictor_norm"],
        num_patches=(view_size // model["patch_size"]) ** 2,
        dtype=dtype,
        rngs=rngs,
    )
    projection = None
    if model["projection_dim"]:
        projection = ProjectionHead(
            model["embed_dim"], model["projection_dim"], dtype=dtype, rngs=rngs
        )
    mae = build_mae(model, channels=channels, view_size=view_size, rngs=rngs)
    return CrossScaleMAE(mae, predictor, projection)


def channel_groups(model: Config) -> tuple[tuple[int, ...], ...]:
    """SatMAE's; the other methods have no such field."""
    return tuple(tuple(group) for group in model.get("channel_groups", ()))


def _blocks(model: Config, part: str, rngs: nnx.Rngs) -> Block:
    """The encoder's blocks, or with `part="decoder_"` the decoder's."""
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


def _positions(model: Config, part: str) -> TokenPositions:
    groups = len(channel_groups(model))
    return TokenPositions(
        model[f"{part}embed_dim"],
        position=model["position"],
        reference_gsd=model["reference_gsd"],
        groups=groups,
        group_dim=model[f"{part}group_dim"] if groups else 0,
    )


def _decoder(
    model: Config, head: nnx.Module, rngs: nnx.Rngs, *, use_cls_token: bool = True
) -> Decoder:
    return Decoder(
        _blocks(model, "decoder_", rngs),
        head,
        encoder_dim=model["embed_dim"],
        positions=_positions(model, "decoder_"),
        use_cls_token=use_cls_token,
        rngs=rngs,
        **_execution(model),
    )


def _execution(model: Config) -> dict[str, Any]:
    """How the blocks are run; it changes no number beyond rounding."""
    dtype = jnp.dtype(model["dtype"])
    return {"remat": model["remat"], "scan": model["scan"], "dtype": dtype}
