"""SimCLR (Chen et al. 2020): one encoder, two views, and no reconstruction."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.cross_scale_mae import ProjectionHead
from xsmae.models.mae import Views, offsets
from xsmae.models.masking import valid_patches
from xsmae.models.vit import Encoder

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SimCLROutput:
    """embedding: [batch, 2, dim], the mean patch token of each view, or its projection.

    Patches that are not valid do not count.
    """

    embedding: Float[Array, "batch two dim"]


class SimCLR(nnx.Module):
    """An encoder that reads all patches of both views, and a projection head or none.

    There are no masks. The encoder reads patches that are not valid as the bands' mean,
    as an exported encoder does.
    """

    def __init__(self, encoder: Encoder, projection: ProjectionHead | None = None):
        self.encoder = encoder
        self.projection = projection

    def parts(self) -> dict[str, nnx.Module]:
        """The networks that it consists of, by name."""
        parts = {"encoder": self.encoder}
        if self.projection is not None:
            parts["projection"] = self.projection
        return parts

    def noise_size(self, height: int, width: int) -> int:
        """The number of uniform numbers that a view needs."""
        return 0

    def __call__(
        self, views: Views, noise: Float[Array, "batch two numbers"]
    ) -> SimCLROutput:
        """Encodes both views."""
        batch = views.images.shape[0]
        offset = offsets(views, self.encoder)

        def merge(x):
            return rearrange(x, "b v ... -> (b v) ...")

        tokens = self.encoder(
            merge(views.images),
            gsd=merge(views.gsd),
            offset=None if offset is None else merge(offset),
        )
        patches = tokens[:, 1:].astype(jnp.float32)
        if views.valid is None:
            embedding = patches.mean(axis=1)
        else:
            valid = valid_patches(merge(views.valid), self.encoder.patch_size)
            part = valid[..., None].astype(jnp.float32)
            embedding = (patches * part).sum(axis=1) / jnp.maximum(part.sum(axis=1), 1)
        if self.projection is not None:
            embedding = self.projection(embedding.astype(tokens.dtype))
        return SimCLROutput(rearrange(embedding, "(b v) d -> b v d", b=batch))
