"""SIGReg with pixels: two masked views that are reconstructed, and local crops.

Embeddings of all of them are projected to few numbers, which shall agree between the
views of a place and be distributed like a normal distribution (Balestriero & LeCun
2025, LeJEPA). There is no teacher and there are no negatives.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.mae import MAE, MAEOutput, Views
from xsmae.models.masking import valid_patches
from xsmae.models.scale_distill import NUMBERS_PER_BOX, CoarseViews
from xsmae.models.vit import Encoder, Linear
from xsmae.ops import resize

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Uniform numbers of float32 have 23 random bits; two make the key of a step.
SEED_NUMBERS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SIGRegOutput(MAEOutput):
    """The outputs in addition to those of the MAE, which are of the two masked views.

    projected: [batch, all_views, dim] float32, of the masked views and the local crops.
    directions: [dim, directions], unit vectors, drawn anew in every step.
    """

    projected: Float[Array, "batch all_views dim"]
    directions: Float[Array, "dim directions"]


class BatchNorm(nnx.Module):
    """Normalises each feature by its mean and variance in the batch.

    It keeps no running statistics: the projector is not used after training.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=0, keepdims=True)
        variance = jnp.square(wide).mean(axis=0)
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        return (wide * scale[None] + self.bias[...][None]).astype(x.dtype)


class Projector(nnx.Module):
    """Three layers, with a batch norm and ReLU behind the first two."""

    def __init__(
        self, width: int, hidden: int, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        # No bias before a batch norm, which removes it.
        plain = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(width, hidden, **plain)
        self.norm1 = BatchNorm(hidden)
        self.fc2 = Linear(hidden, hidden, **plain)
        self.norm2 = BatchNorm(hidden)
        self.fc3 = Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch dim"]:
        x = jax.nn.relu(self.norm1(self.fc1(x)))
        return self.fc3(jax.nn.relu(self.norm2(self.fc2(x))))


class SIGRegMAE(nnx.Module):
    """An MAE of two views, local crops that its encoder reads whole, and a projector.

    A local crop is a box of view 1 at fewer pixels, resampled by averaging the area.
    local: the crops, which have one side; None: no crops.
    """

    def __init__(
        self, mae: MAE, local: CoarseViews | None, projector: Projector, directions: int
    ):
        self.mae = mae
        self.local = local
        self.projector = projector
        self.directions = directions

    @property
    def encoder(self) -> Encoder:
        """The part that is exported."""
        return self.mae.encoder

    def parts(self) -> dict[str, nnx.Module]:
        """The networks that it consists of, by name."""
        return {**self.mae.parts(), "projector": self.projector}

    def noise_size(self, height: int, width: int) -> int:
        """The uniform numbers of a view: of its mask, the boxes and the directions."""
        boxes = NUMBERS_PER_BOX * (len(self.local.sides) if self.local else 0)
        return self.mae.noise_size(height, width) + boxes + SEED_NUMBERS

    def __call__(
        self, views: Views, noise: Float[Array, "batch two numbers"]
    ) -> SIGRegOutput:
        """Runs the MAE on both views, encodes the crops and projects all of them."""
        masked = self.mae.noise_size(*views.images.shape[2:4])
        output = self.mae(views, noise[..., :masked])
        # The mean of the visible patch tokens, without the class token.
        embedding = output.encoder_tokens[:, :, 1:].astype(jnp.float32).mean(axis=2)
        if self.local:
            numbers = noise[:, 0, masked:-SEED_NUMBERS]
            local = self._local(views, numbers, instead=embedding[:, 0])
            embedding = jnp.concatenate([embedding, local], axis=1)
        batch = len(embedding)
        merged = rearrange(embedding, "b v d -> (b v) d")
        projected = self.projector(merged.astype(output.encoder_tokens.dtype))
        projected = rearrange(
            projected.astype(jnp.float32), "(b v) d -> b v d", b=batch
        )
        return SIGRegOutput(
            **{f.name: getattr(output, f.name) for f in dataclasses.fields(output)},
            projected=projected,
            directions=draw_directions(
                noise[0, 0, -SEED_NUMBERS:], projected.shape[-1], self.directions
            ),
        )

    def _local(
        self,
        views: Views,
        uniform: Float[Array, "batch numbers"],
        *,
        instead: Float[Array, "batch width"],
    ) -> Float[Array, "batch crops width"]:
        """The mean patch token of each local crop.

        Patches that are not valid do not count. A crop without any that is valid has
        the embedding `instead`.
        """
        encoder, size, side = self.encoder, views.images.shape[2:4], self.local.sides[0]
        boxes = jnp.stack(self.local.boxes(uniform, size), axis=1)
        batch, crops = boxes.shape[:2]

        def merge(x):
            return rearrange(x, "b v ... -> (b v) ...")

        def for_each(x):
            return jnp.repeat(x, crops, axis=0)

        box = merge(boxes)
        valid = None if views.valid is None else for_each(views.valid[:, 0])
        images, valid = resize.area_of_boxes(
            for_each(views.images[:, 0]), box, (side, side), valid
        )
        extent = for_each(views.gsd[:, 0]) * jnp.array([size], jnp.float32)  # metres
        offset = None
        if encoder.positions.position == "gsd":
            unit = encoder.patch_size * encoder.positions.reference_gsd
            offset = box[:, :2] * extent / unit
        gsd = (box[:, 2:] - box[:, :2]) * extent / side
        patches = encoder(images, gsd=gsd, offset=offset)[:, 1:].astype(jnp.float32)
        if valid is None:
            found = patches.mean(axis=1)
        else:
            part = valid_patches(valid, encoder.patch_size)[..., None]
            total = part.sum(axis=1)
            found = (patches * part).sum(axis=1) / jnp.maximum(total, 1)
            found = jnp.where(total > 0, found, for_each(instead))
        return rearrange(found, "(b v) d -> b v d", b=batch)


def draw_directions(
    seed: Float[Array, " two"], dim: int, count: int
) -> Float[Array, "dim count"]:
    """Random unit vectors, as columns. `seed` is in 0-1 and decides them."""
    first, second = (seed * 2**23).astype(jnp.uint32)
    key = jax.random.fold_in(jax.random.key(first), second)
    vectors = jax.random.normal(key, (dim, count))
    return vectors / jnp.linalg.norm(vectors, axis=0, keepdims=True)
