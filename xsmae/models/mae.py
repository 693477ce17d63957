"""The masked autoencoder (He et al. 2022): one encoder, a light decoder, any views."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.masking import random_masking, take_tokens
from xsmae.models.position import patch_positions
from xsmae.models.vit import Encoder, LayerNorm, linear, run_blocks, stacked_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """What a pretraining model reads: V views of the ground of each sample.

    images: [batch, views, height, width, channels], normalised.
    gsd: [batch, views, 2], metres per pixel of the view, (y, x).
    box: [batch, views, 4], the view's (top, left, bottom, right) as fractions of view 1
        as it is displayed; (0, 0, 1, 1) for view 1.
    """

    images: Float[Array, "batch views height width channels"]
    gsd: Float[Array, "batch views 2"]
    box: Float[Array, "batch views 4"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MAEOutput:
    """What a masked autoencoder computes for every view.

    pred: [batch, views, patches, values], the predicted patches.
    mask: [batch, views, patches], 1 = hidden.
    encoder_tokens: [batch, views, 1 + kept, embed_dim], class token first.
    decoder_tokens: [batch, views, 1 + patches, decoder_embed_dim], after the norm.
    """

    pred: Float[Array, "batch views patches values"]
    mask: Float[Array, "batch views patches"]
    encoder_tokens: Float[Array, "batch views kept width"]
    decoder_tokens: Float[Array, "batch views tokens decoder_width"]


class Decoder(nnx.Module):
    """The MAE decoder: visible tokens and mask tokens in, every patch's values out."""

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        encoder_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_style: str = "pre",
        norm_epsilon: float = 1e-6,
        position: str = "fixed",
        reference_gsd: float | None = None,
        attention_implementation: str = "xla",
        remat: str = "none",
        scan: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embed_dim = embed_dim
        self.position = position
        self.reference_gsd = reference_gsd
        self.remat = remat
        self.scan = scan
        self.dtype = dtype
        self.embed = linear(encoder_dim, embed_dim, dtype=dtype, rngs=rngs)
        # std 0.02: as the class token, see Encoder.
        self.mask_token = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, 1, embed_dim))
        )
        self.blocks = stacked_blocks(
            depth,
            embed_dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            norm_style=norm_style,
            norm_epsilon=norm_epsilon,
            attention_implementation=attention_implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(embed_dim, epsilon=1e-6, out_dtype=dtype, rngs=rngs)
        self.pred = linear(
            embed_dim, patch_size * patch_size * channels, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        encoder_tokens: Float[Array, "batch kept encoder_width"],
        ids_restore: Int[Array, "batch patches"],
        *,
        grid: tuple[int, int],
        gsd: Float[Array, "batch 2"] | None = None,
        offset: Float[Array, "batch 2"] | None = None,
    ) -> tuple[
        Float[Array, "batch patches values"], Float[Array, "batch tokens width"]
    ]:
        """The predicted patches and the normalised tokens, class token first."""
        x = self.embed(encoder_tokens)
        cls_token, visible = x[:, :1], x[:, 1:]
        hidden = ids_restore.shape[1] - visible.shape[1]
        mask_token = self.mask_token[...].astype(self.dtype)
        mask_tokens = jnp.broadcast_to(mask_token, (x.shape[0], hidden, self.embed_dim))
        x = take_tokens(jnp.concatenate([visible, mask_tokens], axis=1), ids_restore)
        position = patch_positions(
            grid,
            self.embed_dim,
            position=self.position,
            gsd=gsd,
            reference_gsd=self.reference_gsd,
            offset=offset,
        )
        x = jnp.concatenate([cls_token, x + position.astype(self.dtype)], axis=1)
        x = run_blocks(self.blocks, x, remat=self.remat, scan=self.scan)
        tokens = self.norm(x)
        return self.pred(tokens[:, 1:]), tokens


class MAE(nnx.Module):
    """Encoder and decoder. All views of all samples go through in one batch."""

    def __init__(self, encoder: Encoder, decoder: Decoder, *, mask_ratio: float):
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio

    def parts(self) -> dict[str, nnx.Module]:
        """The networks it is made of, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def __call__(
        self, views: Views, noise: Float[Array, "batch views patches"]
    ) -> MAEOutput:
        """Mask by the order of `noise`, encode what is left, predict every patch."""
        batch, num_views, height, width, _ = views.images.shape
        patch_size = self.encoder.patch_size

        # Samples first: a batch sharded over devices stays where it is.
        def merge(x):
            return rearrange(x, "b v ... -> (b v) ...")

        def divide(x):
            return rearrange(x, "(b v) ... -> b v ...", b=batch, v=num_views)

        gsd, offset = merge(views.gsd), None
        if self.encoder.position == "gsd":
            # From view 1's corner to the view's, in patches of the reference GSD.
            extent = views.gsd[:, :1] * jnp.array([height, width], jnp.float32)
            unit = patch_size * self.encoder.reference_gsd
            offset = merge(views.box[..., :2] * extent / unit)
        masking = random_masking(merge(noise), self.mask_ratio)
        encoder_tokens = self.encoder(
            merge(views.images), gsd=gsd, offset=offset, ids_keep=masking.ids_keep
        )
        pred, decoder_tokens = self.decoder(
            encoder_tokens,
            masking.ids_restore,
            grid=(height // patch_size, width // patch_size),
            gsd=gsd,
            offset=offset,
        )
        return MAEOutput(
            pred=divide(pred),
            mask=divide(masking.mask),
            encoder_tokens=divide(encoder_tokens),
            decoder_tokens=divide(decoder_tokens),
        )
