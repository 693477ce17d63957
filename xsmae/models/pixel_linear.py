"""A linear layer on every patch token, resized to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from xsmae.models.linear import BatchNormLinear
from xsmae.ops import resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class PixelLinear(BatchNormLinear):
    """Batch norm without scale and bias, one linear layer, bilinear to the pixels."""

    def __call__(
        self,
        features: Float[Array, "batch rows columns width"],
        *,
        size: tuple[int, int],
        training: bool,
    ) -> Float[Array, "batch height width classes"]:
        """Scores of all pixels of images of `size`."""
        scores = self.scores(features.astype(jnp.float32), training=training)
        return resize.bilinear(scores, size)
