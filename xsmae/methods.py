"""The pretraining methods: each is a model, its losses and its number of views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from xsmae import losses
from xsmae.models.cross_scale_mae import (
    CrossScaleMAE,
    CrossScaleMAEOutput,
    Predictor,
    ProjectionHead,
)
from xsmae.models.mae import MAE, Decoder, MAEOutput, Views
from xsmae.models.vit import Encoder, patchify

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Config = Mapping[str, Any]
    # The terms that the total is made of, and what is only reported.
    Terms = dict[str, Float[Array, ""]]

NUM_CHANNELS = 3


def build_encoder(model: Config, *, rngs: nnx.Rngs) -> Encoder:
    """The encoder that `config.model` describes."""
    return Encoder(
        embed_dim=model["embed_dim"],
        depth=model["depth"],
        num_heads=model["num_heads"],
        use_norm=model["encoder_norm"],
        **_shared(model),
        rngs=rngs,
    )


def build_mae(model: Config, *, view_size: int, rngs: nnx.Rngs) -> MAE:
    """Encoder and decoder; `view_size` does not matter to them."""
    decoder = Decoder(
        encoder_dim=model["embed_dim"],
        embed_dim=model["decoder_embed_dim"],
        depth=model["decoder_depth"],
        num_heads=model["decoder_num_heads"],
        **_shared(model),
        rngs=rngs,
    )
    encoder = build_encoder(model, rngs=rngs)
    return MAE(encoder, decoder, mask_ratio=model["mask_ratio"])


def build_cross_scale_mae(
    model: Config, *, view_size: int, rngs: nnx.Rngs
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
    mae = build_mae(model, view_size=view_size, rngs=rngs)
    return CrossScaleMAE(mae, predictor, projection)


def _shared(model: Config) -> dict[str, Any]:
    """What the encoder and the decoder have in common."""
    return {
        "patch_size": model["patch_size"],
        "channels": NUM_CHANNELS,
        "mlp_ratio": model["mlp_ratio"],
        "norm_style": model["norm_style"],
        "norm_epsilon": model["norm_epsilon"],
        "position": model["position"],
        "reference_gsd": model["reference_gsd"],
        "attention_implementation": model["attention"],
        "remat": model["remat"],
        "scan": model["scan"],
        "dtype": jnp.dtype(model["dtype"]),
    }


def mae_losses(
    output: MAEOutput, views: Views, *, patch_size: int, loss: Config
) -> tuple[Terms, Terms]:
    """The reconstruction of the one view."""
    per_view = _reconstruction(output, views, patch_size, loss)
    return {"reconstruction": per_view[0]}, {}


def cross_scale_mae_losses(
    output: CrossScaleMAEOutput, views: Views, *, patch_size: int, loss: Config
) -> tuple[Terms, Terms]:
    """L_re, L_cc and L_cp of Tang et al. 2023, section 3."""
    per_view = _reconstruction(output, views, patch_size, loss)
    height, width = views.images.shape[2:4]
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
            grid=(height // patch_size, width // patch_size),
        ),
    }
    return terms, {
        "reconstruction_view1": per_view[0],
        "reconstruction_view2": per_view[1],
    }


def _reconstruction(output, views, patch_size, loss):
    batch, num_views = views.images.shape[:2]
    target = patchify(views.images.reshape(-1, *views.images.shape[2:]), patch_size)
    return losses.reconstruction(
        output.pred,
        target.reshape(batch, num_views, *target.shape[1:]),
        output.mask,
        norm_pix_loss=loss["reconstruction"]["norm_pix_loss"],
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A model of `Views`, and the loss terms of its output by name.

    Every term has a `weight` in `config.loss.<name>`.
    """

    num_views: int
    build: Callable[..., nnx.Module]
    losses: Callable[..., tuple[Terms, Terms]]


METHODS = {
    "mae": Method(1, build_mae, mae_losses),
    "cross_scale_mae": Method(2, build_cross_scale_mae, cross_scale_mae_losses),
}
