"""Scale-MAE (Reed et al. 2023): a decoder head that predicts two frequency bands."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.vit import LayerNorm
from xsmae.ops import resize
from xsmae.ops.gelu import gelu

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

# A head's two upsampling steps turn one pixel of the pyramid into STEP x `stride`
# pixels per side. The pyramid's finer level has PYRAMID times the sides of the patch
# grid.
STEP, PYRAMID = 2, 4

# PyTorch's initialisation of convolutions.
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frequencies:
    """The two predicted bands of the target image.

    low: [..., height / 2, width / 2, channels], the image at half the target's size.
    high: [..., height, width, channels], the target minus its low-pass copy.
    """

    low: Float[Array, "... half_height half_width channels"]
    high: Float[Array, "... height width channels"]


def low_pass(
    images: Float[Array, "... height width channels"],
    cutoff: int,
    size: tuple[int, int],
    valid: Bool[Array, "... height width"] | None = None,
) -> Float[Array, "... new_height new_width channels"]:
    """Averages images down to `cutoff` pixels per side and resizes them to `size`.

    With `valid`, only valid pixels count; `images` must be 0 elsewhere.
    """
    low = resize.bilinear(resize.area(images, (cutoff, cutoff)), size)
    if valid is None:
        return low
    share = low_pass(valid[..., None].astype(low.dtype), cutoff, size)
    return low / jnp.where(share > 0, share, 1)


def combine(
    pred: Frequencies, cutoff: int
) -> Float[Array, "... height width channels"]:
    """Adds the two bands up to the target image (official split_pred)."""
    return low_pass(pred.low, cutoff, pred.high.shape[-3:-1]) + pred.high


def mix(
    in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """A 1x1 convolution."""
    return nnx.Linear(
        in_features, out_features, dtype=dtype, kernel_init=torch_uniform, rngs=rngs
    )


class GroupedConv(nnx.Module):
    """A 3x3 convolution with one output channel per group of channels, same size.

    It is a sum of nine shifted products, because the gradient of XLA's own grouped
    convolution takes 100 times as long on a CPU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (3, 3, in_features // out_features, out_features)
        self.dtype = dtype
        self.kernel = nnx.Param(torch_uniform(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((out_features,)))

    def __call__(self, x: Float[Array, "batch rows columns in_features"]):
        rows, columns = x.shape[1:3]
        _, _, in_group, groups = self.kernel.shape
        # JAX cannot sum the gradients of several slices of the parameter itself.
        kernel = self.kernel[...].astype(self.dtype)[:, :, None, None, None]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        # The channels of a group are contiguous.
        x = rearrange(x, "b h w (g i) -> b h w g i", g=groups, i=in_group)
        products = [
            (x[:, i : i + rows, j : j + columns] * kernel[i, j].mT).sum(axis=-1)
            for i in range(3)
            for j in range(3)
        ]
        return sum(products) + self.bias[...].astype(self.dtype)[None, None, None]


class Upsample(nnx.Module):
    """A transposed convolution that turns a pixel into `stride` x `stride` pixels.

    Its kernel is as large as its stride, so it is a dense layer with outputs arranged
    as pixels. This is several times as fast on a CPU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        kernel = torch_uniform(rngs.params(), (in_features, stride**2 * out_features))
        shape = (in_features, stride, stride, out_features)
        self.kernel = nnx.Param(kernel.reshape(shape))
        self.bias = nnx.Param(jnp.zeros((out_features,)))

    def __call__(self, x: Float[Array, "batch rows columns in_features"]):
        kernel = self.kernel[...].astype(self.dtype)
        x = jnp.einsum("bhwi,ipqo->bhpwqo", x.astype(self.dtype), kernel)
        x = x + jnp.expand_dims(self.bias[...].astype(self.dtype), (0, 1, 2, 3, 4))
        return rearrange(x, "b h p w q o -> b (h p) (w q) o")


class Pyramid(nnx.Module):
    """Upsamples the patches' tokens to maps with 2 and 4 times the grid's sides.

    `progressive`: the finer map is computed from the coarser one; otherwise both are
    computed from the tokens.
    """

    def __init__(
        self, width: int, *, progressive: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        new = functools.partial(Upsample, width, width, 2, dtype=dtype, rngs=rngs)
        self.double = new()
        self.first = None if progressive else new()
        self.norm = LayerNorm(width, epsilon=1e-6, out_dtype=dtype, rngs=rngs)
        self.second = new()

    def __call__(
        self, x: Float[Array, "batch rows columns width"]
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
        """Returns the coarser and the finer map."""
        double = self.double(x)
        first = double if self.first is None else self.first(x)
        return double, self.second(gelu(self.norm(first)))


class ConvBlock(nnx.Module):
    """A grouped 3x3 and a 1x1 convolution, with a 1x1 convolution as shortcut."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.grouped = GroupedConv(width, width // 2, **options)
        self.mix = mix(width // 2, width, **options)
        self.residual = mix(width, width, **options)

    def __call__(self, x: Float[Array, "batch rows columns width"]):
        return self.mix(gelu(self.grouped(gelu(x)))) + self.residual(x)


class ConvHead(nnx.Module):
    """Turns a map of the pyramid into an image with 2 * `stride` times its sides."""

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        depth: int,
        stride: int,
        channels: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.proj = mix(in_features, width, **options)
        self.blocks = nnx.List(ConvBlock(width, **options) for _ in range(depth))
        self.norm = LayerNorm(width, epsilon=1e-6, out_dtype=dtype, rngs=rngs)
        self.up1 = Upsample(width, width // 2, stride, **options)
        self.grouped = GroupedConv(width // 2, width // 4, **options)
        self.mix = mix(width // 4, width // 2, **options)
        self.up2 = Upsample(width // 2, channels, STEP, **options)

    def __call__(self, x: Float[Array, "batch rows columns width"]):
        x = self.proj(x)
        for block in self.blocks:
            x = block(x)
        x = gelu(self.up1(self.norm(x)))
        return self.up2(gelu(self.mix(gelu(self.grouped(x)))))


class ScaleHead(nnx.Module):
    """Predicts the two bands of an image `target_scale` times as large as the view.

    The low band has half that size. Each band has its own convolutional head, or both
    share one (`independent_heads=False`).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        width: int,
        depth: int,
        patch_size: int,
        target_scale: int,
        channels: int,
        independent_heads: bool,
        progressive: bool,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        # Patches of 16 px and target_scale 2 give 4, the constant of official heads.
        stride, rest = divmod(patch_size * target_scale, STEP * PYRAMID)
        if rest or not stride:
            raise ValueError(
                f"patch_size {patch_size} times target_scale {target_scale}, expected "
                f"a multiple of {STEP * PYRAMID}"
            )
        if width % 4:
            raise ValueError(f"head_dim={width}, expected a multiple of 4")
        self.pyramid = Pyramid(
            embed_dim, progressive=progressive, dtype=dtype, rngs=rngs
        )
        new = functools.partial(
            ConvHead,
            embed_dim,
            width,
            depth=depth,
            stride=stride,
            channels=channels,
            dtype=dtype,
            rngs=rngs,
        )
        self.low = new()
        self.high = new() if independent_heads else None

    def __call__(
        self, tokens: Float[Array, "batch patches width"], *, grid: tuple[int, int]
    ) -> Frequencies:
        x = rearrange(tokens, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
        coarse, fine = self.pyramid(x)
        high = self.low if self.high is None else self.high
        return Frequencies(low=self.low(coarse), high=high(fine))
