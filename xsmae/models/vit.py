"""The vision transformer: patches, blocks and the encoder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from xsmae.models.masking import take_tokens
from xsmae.models.position import TokenPositions
from xsmae.ops.attention.api import attention
from xsmae.ops.attention.flash import ATTENDED
from xsmae.ops.gelu import gelu
from xsmae.ops.layer_norm import layer_norm
from xsmae.sharding import whole_where_used

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

NORM_STYLES = ("pre", "post")

# Rematerialisation: values to keep for the backward pass; the rest is recomputed.
_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    "none": None,
    # Recomputing anything except products costs no more than writing and reading it.
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        _products, jax.checkpoint_policies.save_only_these_names(ATTENDED)
    ),
    "dots": _products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def patchify(
    images: Float[Array, "batch height width channels"], patch_size: int
) -> Float[Array, "batch patches values"]:
    """Cuts images into square patches, row by row; values as (row, column, channel)."""
    return rearrange(
        images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size
    )


def unpatchify(
    patches: Float[Array, "batch patches values"],
    patch_size: int,
    grid: tuple[int, int],
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patchify` for a `grid` of (rows, columns) patches."""
    return rearrange(
        patches,
        "b (h w) (p q c) -> b (h p) (w q) c",
        h=grid[0],
        w=grid[1],
        p=patch_size,
        q=patch_size,
    )


def _whole_in_dtype(arrays, *, dtype):
    """Casts rows, kernel and bias, then gathers the kernel: half the bytes."""
    rows, kernel, bias = promote_dtype(arrays, dtype=dtype)
    return rows, whole_where_used(kernel), bias


class Linear(nnx.Linear):
    """A dense layer with MAE's initialisation: Xavier-uniform weights, zero bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        use_bias: bool = True,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=jnp.float32,
            kernel_init=nnx.initializers.xavier_uniform(),
            promote_dtype=_whole_in_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        # Merge all axes except the last. The gradient of the weights is then a plain
        # product. XLA is slower on CPUs with a contraction over several axes.
        rows = super().__call__(x.reshape(-1, self.in_features))
        return rows.reshape(*x.shape[:-1], self.out_features)


def token(width: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """A learned token with std 0.02, as in the official models_mae.py."""
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))


class LayerNorm(nnx.LayerNorm):
    """LayerNorm that computes in float32 and casts the result to `out_dtype`."""

    def __init__(
        self, width: int, *, epsilon: float, out_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(
            width,
            epsilon=epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.out_dtype = out_dtype

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return layer_norm(
            x, self.scale[...], self.bias[...], self.epsilon, self.out_dtype
        )


class Block(nnx.Module):
    """A transformer block: attention, then two dense layers, each with a residual.

    `norm_style` is `pre` (x + f(norm(x)), as in timm) or `post` (norm(x + f(x)), the
    xFormers setting of the released Cross-Scale MAE weights).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm_style: str = "pre",
        norm_epsilon: float = 1e-6,
        attention_implementation: str = "xla",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if norm_style not in NORM_STYLES:
            raise ValueError(
                f"norm_style={norm_style!r}, expected one of {NORM_STYLES}"
            )
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of {num_heads} heads")
        self.norm_style = norm_style
        self.num_heads = num_heads
        self.attention_implementation = attention_implementation
        new_linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        new_norm = functools.partial(
            LayerNorm, width, epsilon=norm_epsilon, out_dtype=dtype, rngs=rngs
        )
        hidden = int(width * mlp_ratio)
        self.norm1 = new_norm()
        self.qkv = new_linear(width, 3 * width)
        self.proj = new_linear(width, width)
        self.norm2 = new_norm()
        self.fc1 = new_linear(width, hidden)
        self.fc2 = new_linear(hidden, width)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        branch_scale: Float[Array, "2 batch"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """`branch_scale` multiplies the two residual branches; see `drop_path`."""

        def scale(residual, branch):
            if branch_scale is None:
                return residual
            return residual * branch_scale[branch, :, None, None].astype(x.dtype)

        if self.norm_style == "pre":
            x = x + scale(self._attend(self.norm1(x)), 0)
            return x + scale(self._mlp(self.norm2(x)), 1)
        x = self.norm1(x + scale(self._attend(x), 0))
        return self.norm2(x + scale(self._mlp(x), 1))

    def _attend(self, x):
        attended = attention(
            self.qkv(x),
            num_heads=self.num_heads,
            implementation=self.attention_implementation,
        )
        return self.proj(checkpoint_name(attended, ATTENDED))

    def _mlp(self, x):
        return self.fc2(gelu(self.fc1(x)))


def stacked_blocks(depth: int, *args, rngs: nnx.Rngs, **kwargs) -> Block:
    """`depth` blocks in one module; every parameter has a leading layer axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(*args, rngs=rngs, **kwargs)

    return create(rngs)


def run_blocks(
    blocks: Block,
    x: Float[Array, "batch tokens width"],
    *,
    branch_scales: Float[Array, "depth 2 batch"] | None = None,
    remat: str = "elementwise",
    scan: bool = True,
) -> Float[Array, "batch tokens width"]:
    """Applies stacked blocks one after the other, each with its `branch_scales`.

    `scan=False` unrolls the loop: the same numbers, a longer compilation, and faster
    steps on GPUs. On CPUs it keeps all values for the backward pass, whatever `remat`
    is.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r}, expected one of {tuple(REMAT_POLICIES)}")
    graphdef, layers = nnx.split(blocks)
    layers = (layers, branch_scales)  # None has no leaves to scan over

    def apply(x, layer):
        params, branch_scale = layer
        return nnx.merge(graphdef, params)(x, branch_scale), None

    if remat != "none":
        # Without a loop, XLA would merge recomputed values with the first ones and keep
        # them. prevent_cse stops that, except on CPUs.
        apply = jax.checkpoint(
            apply, policy=REMAT_POLICIES[remat], prevent_cse=not scan
        )
    if scan:
        return jax.lax.scan(apply, x, layers)[0]
    for index in range(jax.tree.leaves(layers)[0].shape[0]):
        x, _ = apply(x, jax.tree.map(lambda leaf, i=index: leaf[i], layers))
    return x


class PatchEmbed(nnx.Module):
    """Turns square patches into tokens with one dense layer."""

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        embed_dim: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.proj = Linear(
            patch_size * patch_size * channels, embed_dim, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        ids_keep: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """One token per patch, row by row, or only `ids_keep` if it is given."""
        patches = patchify(images, self.patch_size).astype(self.proj.dtype)
        if ids_keep is not None:
            # Gathering first leaves a quarter of the embedding's work.
            patches = take_tokens(patches, ids_keep)
        return self.proj(patches)


class Encoder(nnx.Module):
    """The ViT encoder for (visible) patches. Its output has the class token first.

    `use_norm=False` skips the final LayerNorm but keeps its parameters, like the
    official Cross-Scale MAE training.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Block,
        *,
        positions: TokenPositions,
        use_norm: bool = True,
        remat: str = "elementwise",
        scan: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_embed.patch_size
        self.embed_dim = positions.embed_dim
        self.positions = positions
        self.use_norm = use_norm
        self.remat = remat
        self.scan = scan
        self.dtype = dtype
        self.patch_embed = patch_embed
        self.cls_token = token(self.embed_dim, rngs=rngs)
        self.blocks = blocks
        # The official encoders use 1e-6 here, whatever the blocks' epsilon is.
        self.norm = LayerNorm(self.embed_dim, epsilon=1e-6, out_dtype=dtype, rngs=rngs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The (rows, columns) of patches of an image; ValueError if not whole."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height}x{width} px, expected multiples of the patch "
                f"size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        gsd: Float[Array, "batch 2"] | None = None,
        offset: Float[Array, "batch 2"] | None = None,
        ids_keep: Int[Array, "batch kept"] | None = None,
        branch_scales: Float[Array, "depth 2 batch"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Encodes normalised images, or only the tokens `ids_keep` if it is given.

        `branch_scales` come from `drop_path_scales`, in fine-tuning.
        """
        x = run_blocks(
            self.blocks,
            self.embed(images, gsd=gsd, offset=offset, ids_keep=ids_keep),
            branch_scales=branch_scales,
            remat=self.remat,
            scan=self.scan,
        )
        return self.norm(x) if self.use_norm else x

    def embed(self, images, *, gsd=None, offset=None, ids_keep=None):
        """What the first block reads: the class token, then patches with positions."""
        grid = self.grid(*images.shape[1:3])
        position = self.positions(grid, gsd=gsd, offset=offset)
        if ids_keep is not None:
            position = take_tokens(position, ids_keep)
        x = self.patch_embed(images, ids_keep) + position.astype(self.dtype)
        # The class token's position is zero (official models_mae.py).
        cls_token = self.cls_token[...].astype(self.dtype)
        cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, self.embed_dim))
        return jnp.concatenate([cls_token, x], axis=1)
