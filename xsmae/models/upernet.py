"""UperNet (Xiao et al. 2018) on the tokens of a vision transformer.

The neck follows mmsegmentation's Feature2Pyramid, the head its UPerHead, which is also
Hugging Face's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.vit import LayerNorm, Linear
from xsmae.ops import resize
from xsmae.ops.gelu import gelu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key

    Maps = Sequence[Float[Array, "batch rows columns width"]]

POOLED = (1, 2, 3, 6)  # sides of the pooled maps
LEVELS = 4
NORMS = ("batch", "group")
MOST_GROUPS = 32  # of group norm
FEWEST_CROPS = 8  # of a step with batch norm


def head_channels(embed_dim: int) -> int:
    """The channels of a head: 512 for ViT-B and larger, 256 for S, 128 below."""
    return 512 if embed_dim >= 768 else 256 if embed_dim >= 384 else 128


def norm_for(batch_size: int) -> str:
    """Group norm below 8 crops per step, whose statistics are too noisy."""
    return "batch" if batch_size >= FEWEST_CROPS else "group"


class Norm(nnx.Module):
    """Batch norm over the whole global batch, or group norm over each map.

    The running variance averages biased variances; PyTorch averages unbiased ones.
    """

    def __init__(self, width: int, kind: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if kind not in NORMS:
            raise ValueError(f"norm={kind!r}, expected one of {', '.join(NORMS)}")
        self.dtype = dtype
        options = {"epsilon": 1e-5, "use_fast_variance": False, "dtype": jnp.float32}
        if kind == "batch":
            self.norm = nnx.BatchNorm(width, momentum=0.9, **options, rngs=rngs)
        else:
            groups = math.gcd(MOST_GROUPS, width)
            self.norm = nnx.GroupNorm(width, groups, **options, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch rows columns width"], *, training: bool
    ) -> Float[Array, "batch rows columns width"]:
        if isinstance(self.norm, nnx.BatchNorm):
            x = self.norm(x, use_running_average=not training)
        else:
            x = self.norm(x)
        return x.astype(self.dtype)


class ConvNorm(nnx.Module):
    """A square convolution without bias, a norm and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int,
        *,
        norm: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (side, side),
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = Norm(outputs, norm, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch rows columns inputs"], *, training: bool
    ) -> Float[Array, "batch rows columns outputs"]:
        return jax.nn.relu(self.norm(self.conv(x), training=training))


class Doubled(nnx.Module):
    """A transposed convolution of side 2 and stride 2: a 2x2 square from each token."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = Linear(width, 4 * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch rows columns width"]
    ) -> Float[Array, "batch rows2 columns2 width"]:
        return rearrange(self.proj(x), "b y x (p q d) -> b (y p) (x q) d", p=2, q=2)


class Neck(nnx.Module):
    """Maps of a quarter, a half, once and twice the patch size per pixel.

    For patch 16 their strides are 4, 8, 16 and 32 pixels, for patch 8 they are 2, 4, 8
    and 16. `tap_norm` adds a LayerNorm to each tap. A frozen encoder needs it, since
    its blocks cannot adapt their scale.
    """

    def __init__(
        self,
        width: int,
        *,
        norm: str,
        tap_norm: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        new_norm = functools.partial(LayerNorm, width, epsilon=1e-6, out_dtype=dtype)
        self.tap_norms = nnx.List(
            new_norm(rngs=rngs) for _ in range(LEVELS if tap_norm else 0)
        )
        self.up4_first = Doubled(width, dtype=dtype, rngs=rngs)
        self.up4_norm = Norm(width, norm, dtype=dtype, rngs=rngs)
        self.up4_second = Doubled(width, dtype=dtype, rngs=rngs)
        self.up2 = Doubled(width, dtype=dtype, rngs=rngs)

    def __call__(self, taps: Maps, *, training: bool) -> Maps:
        rows, columns = taps[-1].shape[1:3]
        if min(rows, columns) < 2:
            raise ValueError(
                f"a map of {rows}x{columns} patches, expected 2x2 or more: give larger "
                "crops"
            )
        if self.tap_norms:
            taps = [norm(x) for norm, x in zip(self.tap_norms, taps, strict=True)]
        first, second, third, fourth = taps
        first = self.up4_norm(self.up4_first(first), training=training)
        return [
            self.up4_second(gelu(first)),
            self.up2(second),
            third,
            nnx.max_pool(fourth, (2, 2), (2, 2)),
        ]


class UperNetHead(nnx.Module):
    """Pyramid pooling of the coarsest map, a top-down path, and scores of the finest.

    widths: the channels of the maps, from fine to coarse. dropout: the share of whole
    channels that training hides from the last layer.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        channels: int,
        norm: str = "batch",
        dropout: float = 0.1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        new = functools.partial(ConvNorm, norm=norm, dtype=dtype, rngs=rngs)
        self.dropout = dropout
        self.pooled = nnx.List(new(widths[-1], channels, 1) for _ in POOLED)
        self.bottleneck = new(widths[-1] + len(POOLED) * channels, channels, 3)
        self.laterals = nnx.List(new(width, channels, 1) for width in widths[:-1])
        self.smoothed = nnx.List(new(channels, channels, 3) for _ in widths[:-1])
        self.fuse = new(len(widths) * channels, channels, 3)
        self.classifier = nnx.Linear(
            channels,
            num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            rngs=rngs,
        )

    def __call__(
        self, maps: Maps, *, training: bool, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch rows columns classes"]:
        """float32 scores at the resolution of the first map; `key` turns on dropout."""
        tops = [
            layer(x, training=training)
            for layer, x in zip(self.laterals, maps[:-1], strict=True)
        ]
        tops.append(self._pool(maps[-1], training))
        for level in range(len(tops) - 2, -1, -1):
            above = resize.bilinear(tops[level + 1], tops[level].shape[1:3])
            tops[level] = tops[level] + above
        outputs = [
            layer(x, training=training)
            for layer, x in zip(self.smoothed, tops[:-1], strict=True)
        ]
        outputs.append(tops[-1])
        size = outputs[0].shape[1:3]
        outputs = [outputs[0], *(resize.bilinear(x, size) for x in outputs[1:])]
        fused = self.fuse(jnp.concatenate(outputs, axis=-1), training=training)
        if key is not None and self.dropout:
            fused = drop_channels(key, fused, rate=self.dropout)
        return self.classifier(fused.astype(jnp.float32))

    def _pool(self, x, training):
        size, found = x.shape[1:3], [x]
        for side, layer in zip(POOLED, self.pooled, strict=True):
            pooled = layer(resize.area(x, (side, side)), training=training)
            found.append(resize.bilinear(pooled, size))
        return self.bottleneck(jnp.concatenate(found, axis=-1), training=training)


class UperNet(nnx.Module):
    """The neck and the head, from the four token maps of `taps.token_maps`."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        norm: str,
        tap_norm: bool,
        channels: int = 0,
        dropout: float = 0.1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """channels: 0 means `head_channels(width)`."""
        self.neck = Neck(width, norm=norm, tap_norm=tap_norm, dtype=dtype, rngs=rngs)
        self.head = UperNetHead(
            [width] * LEVELS,
            num_classes,
            channels=channels or head_channels(width),
            norm=norm,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, taps: Maps, *, training: bool, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch rows columns classes"]:
        """Scores at a quarter of a patch's side per pixel."""
        return self.head(self.neck(taps, training=training), training=training, key=key)


def drop_channels(
    key: Key[Array, ""], x: Float[Array, "batch rows columns width"], *, rate: float
) -> Float[Array, "batch rows columns width"]:
    """Sets whole channels of a map to 0 with probability `rate`, scales the others."""
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
