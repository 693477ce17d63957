"""A linear layer on every patch token, resized to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from xsmae.ops import resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class PixelLinear(nnx.Module):
    """Batch norm without scale and bias, one linear layer, bilinear to the pixels."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        momentum: float,
        epsilon: float,
        head_std: float,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.BatchNorm(
            width,
            momentum=1 - momentum,
            epsilon=epsilon,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.head = nnx.Linear(
            width,
            num_classes,
            kernel_init=nnx.initializers.normal(head_std),
            rngs=rngs,
        )

    def __call__(
        self,
        features: Float[Array, "batch rows columns width"],
        *,
        size: tuple[int, int],
        training: bool,
    ) -> Float[Array, "batch height width classes"]:
        """Scores of all pixels of images of `size`."""
        features = features.astype(jnp.float32)
        features = self.norm(features, use_running_average=not training)
        return resize.bilinear(self.head(features), size)
