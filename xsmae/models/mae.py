"""The masked autoencoder (He et al. 2022): an encoder and a light decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.masking import (
    Masking,
    random_masking,
    take_tokens,
    valid_patches,
)
from xsmae.models.position import TokenPositions
from xsmae.models.vit import Block, Encoder, LayerNorm, Linear, run_blocks, token

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """The input of a pretraining model: one or more views of each sample.

    images: [batch, views, height, width, channels], normalised.
    gsd: [batch, views, 2], metres per pixel of the view, (y, x).
    box: [batch, views, 4], the view's (top, left, bottom, right) as fractions of view 1
        after mirroring; (0, 0, 1, 1) for view 1.
    target: the same ground at a finer GSD, for methods that predict it.
    valid, target_valid: which pixels of the images and of the target have a value; the
        others are 0. None: all have one.
    """

    images: Float[Array, "batch views height width channels"]
    gsd: Float[Array, "batch views 2"]
    box: Float[Array, "batch views 4"]
    target: Float[Array, "batch views tall wide channels"] | None = None
    valid: Bool[Array, "batch views height width"] | None = None
    target_valid: Bool[Array, "batch views tall wide"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MAEOutput:
    """The outputs of a masked autoencoder for every view.

    pred: the prediction of the decoder's head: [batch, views, patches, values], or
        another structure that a method's head defines.
    mask: [batch, views, patches], 1 = hidden; SatMAE has one mask per group of bands,
        [batch, views, groups, patches]. 0 also for patches that are not valid.
    encoder_tokens: [batch, views, 1 + kept, embed_dim], class token first.
    decoder_tokens: [batch, views, 1 + patches, decoder_embed_dim], after the norm; one
        token less if the decoder has no class token.
    """

    pred: PyTree[Float[Array, "batch views ..."]]
    mask: Float[Array, "batch views ..."]
    encoder_tokens: Float[Array, "batch views kept width"]
    decoder_tokens: Float[Array, "batch views tokens decoder_width"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedViews:
    """Views after masking and the encoder.

    tokens: class token first, then the visible patches. masking: see `Masking`. gsd:
    metres per pixel. offset: of position="gsd", from view 1's corner; None: not needed.
    """

    tokens: Float[Array, "batch views kept width"]
    masking: Masking
    gsd: Float[Array, "batch views 2"]
    offset: Float[Array, "batch views 2"] | None


def offsets(views: Views, encoder: Encoder) -> Float[Array, "batch views 2"] | None:
    """Each view's offset from view 1's corner, in patches of the reference GSD.

    None if the encoder's positions do not depend on the GSD.
    """
    if encoder.positions.position != "gsd":
        return None
    size = views.images.shape[2:4]
    extent = views.gsd[:, :1] * jnp.array([[size]], jnp.float32)
    unit = encoder.patch_size * encoder.positions.reference_gsd
    return views.box[..., :2] * extent / unit


class PatchHead(nnx.Module):
    """Predicts the values of each patch, in `patchify`'s order, with a dense layer."""

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        embed_dim: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.pred = Linear(
            embed_dim, patch_size * patch_size * channels, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, tokens: Float[Array, "batch patches width"], *, grid: tuple[int, int]
    ) -> Float[Array, "batch patches values"]:
        return self.pred(tokens)


class Decoder(nnx.Module):
    """The MAE decoder: makes a prediction from visible tokens and mask tokens.

    `head(tokens, grid=...)` turns the patches' tokens into the prediction.
    `use_cls_token=False` drops the class token (Scale-MAE's decoder).
    """

    def __init__(
        self,
        blocks: Block,
        head: nnx.Module,
        *,
        encoder_dim: int,
        positions: TokenPositions,
        use_cls_token: bool = True,
        remat: str = "elementwise",
        scan: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embed_dim = positions.embed_dim
        self.positions = positions
        self.use_cls_token = use_cls_token
        self.remat = remat
        self.scan = scan
        self.dtype = dtype
        self.embed = Linear(encoder_dim, self.embed_dim, dtype=dtype, rngs=rngs)
        self.mask_token = token(self.embed_dim, rngs=rngs)
        self.blocks = blocks
        self.norm = LayerNorm(self.embed_dim, epsilon=1e-6, out_dtype=dtype, rngs=rngs)
        self.head = head

    def __call__(
        self,
        encoder_tokens: Float[Array, "batch kept encoder_width"],
        ids_restore: Int[Array, "batch patches"],
        *,
        grid: tuple[int, int],
        gsd: Float[Array, "batch 2"] | None = None,
        offset: Float[Array, "batch 2"] | None = None,
    ) -> tuple[PyTree[Array], Float[Array, "batch tokens width"]]:
        """The prediction, and the normalised tokens, class token first."""
        x = self.embed(encoder_tokens)
        cls_token, visible = x[:, :1], x[:, 1:]
        hidden = ids_restore.shape[1] - visible.shape[1]
        mask_token = self.mask_token[...].astype(self.dtype)
        mask_tokens = jnp.broadcast_to(mask_token, (x.shape[0], hidden, self.embed_dim))
        x = take_tokens(jnp.concatenate([visible, mask_tokens], axis=1), ids_restore)
        position = self.positions(grid, gsd=gsd, offset=offset)
        x = x + position.astype(self.dtype)
        if self.use_cls_token:
            cls_position = self.positions.of_class_token()
            x = jnp.concatenate([cls_token + cls_position.astype(self.dtype), x], 1)
        x = run_blocks(self.blocks, x, remat=self.remat, scan=self.scan)
        tokens = self.norm(x)
        of_patches = tokens[:, 1:] if self.use_cls_token else tokens
        return self.head(of_patches, grid=grid), tokens


class MAE(nnx.Module):
    """Encoder and decoder. They process all views of all samples in one batch."""

    def __init__(self, encoder: Encoder, decoder: Decoder, *, mask_ratio: float):
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio

    def parts(self) -> dict[str, nnx.Module]:
        """The networks that it consists of, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def noise_size(self, height: int, width: int) -> int:
        """The number of uniform numbers that decide the mask of a view."""
        return math.prod(self.encoder.grid(height, width))

    def random_masking(
        self,
        noise: Float[Array, "batch numbers"],
        valid: Bool[Array, "batch patches"] | None = None,
    ) -> Masking:
        """Chooses the visible tokens by the order of `noise`."""
        return random_masking(noise, self.mask_ratio, valid)

    def encode(
        self, views: Views, noise: Float[Array, "batch views numbers"]
    ) -> EncodedViews:
        """Masks by the order of `noise` and encodes the visible patches."""
        batch, num_views = views.images.shape[:2]
        encoder = self.encoder

        # The samples' axis comes first, so that a sharded batch stays in place.
        def merge(x):
            return rearrange(x, "b v ... -> (b v) ...")

        gsd, offset = merge(views.gsd), offsets(views, encoder)
        offset = None if offset is None else merge(offset)
        valid = None
        if views.valid is not None:
            valid = valid_patches(merge(views.valid), encoder.patch_size)
        masking = self.random_masking(merge(noise), valid)
        tokens = encoder(
            merge(views.images), gsd=gsd, offset=offset, ids_keep=masking.ids_keep
        )
        encoded = EncodedViews(tokens, masking, gsd, offset)
        return jax.tree.map(
            lambda x: rearrange(x, "(b v) ... -> b v ...", b=batch, v=num_views),
            encoded,
        )

    def decode(self, encoded: EncodedViews, *, grid: tuple[int, int]) -> MAEOutput:
        """Predicts all patches of views of `grid` (rows, columns) patches."""
        batch, num_views = encoded.tokens.shape[:2]
        merged = jax.tree.map(lambda x: rearrange(x, "b v ... -> (b v) ..."), encoded)
        pred, decoder_tokens = self.decoder(
            merged.tokens,
            merged.masking.ids_restore,
            grid=grid,
            gsd=merged.gsd,
            offset=merged.offset,
        )

        def divide(x):
            return rearrange(x, "(b v) ... -> b v ...", b=batch, v=num_views)

        return MAEOutput(
            pred=jax.tree.map(divide, pred),
            mask=encoded.masking.mask,
            encoder_tokens=encoded.tokens,
            decoder_tokens=divide(decoder_tokens),
        )

    def __call__(
        self, views: Views, noise: Float[Array, "batch views numbers"]
    ) -> MAEOutput:
        """Masks by the order of `noise`, encodes visible patches, predicts all."""
        grid = self.encoder.grid(*views.images.shape[2:4])
        return self.decode(self.encode(views, noise), grid=grid)
