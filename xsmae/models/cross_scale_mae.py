"""Cross-Scale MAE (Tang et al. 2023): an MAE on two scales of the same ground."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from xsmae.models.mae import MAE, MAEOutput, Views
from xsmae.models.vit import Encoder, LayerNorm, Linear
from xsmae.ops.gelu import gelu

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PREDICTOR_NORMS = ("batch_norm", "layer_norm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossScaleMAEOutput(MAEOutput):
    """The outputs of Cross-Scale MAE, in addition to those of the MAE.

    embedding: [batch, 2, dim], one vector per view for the contrastive loss.
    predicted_tokens: [batch, patches, decoder_embed_dim], the prediction of view 1's
        decoder tokens from view 2.
    """

    embedding: Float[Array, "batch two dim"]
    predicted_tokens: Float[Array, "batch patches decoder_width"]


class PositionBatchNorm(nnx.Module):
    """Batch normalisation with one mean and variance per patch POSITION.

    The official predictor applies `BatchNorm1d(num_patches)` to [batch, patches,
    features], so the statistics are over batch and features. Training uses the
    statistics of the batch and updates the running ones by PyTorch's rule: the running
    variance is unbiased, and `momentum` is the weight of the new value.
    """

    def __init__(
        self, num_patches: int, *, epsilon: float = 1e-5, momentum: float = 0.1
    ):
        self.epsilon = epsilon
        self.momentum = momentum
        self.scale = nnx.Param(jnp.ones((num_patches,)))
        self.bias = nnx.Param(jnp.zeros((num_patches,)))
        self.mean = nnx.BatchStat(jnp.zeros((num_patches,)))
        self.var = nnx.BatchStat(jnp.ones((num_patches,)))

    def __call__(
        self, x: Float[Array, "batch patches features"]
    ) -> Float[Array, "batch patches features"]:
        wide = x.astype(jnp.float32)
        mean = wide.mean(axis=(0, 2))
        var = wide.var(axis=(0, 2))
        count = x.shape[0] * x.shape[2]
        keep = 1 - self.momentum
        self.mean[...] = keep * self.mean[...] + self.momentum * mean
        unbiased = var * (count / (count - 1))
        self.var[...] = keep * self.var[...] + self.momentum * unbiased
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        wide = (wide - mean[None, :, None]) * scale[None, :, None]
        wide = wide + self.bias[...][None, :, None]
        return wide.astype(x.dtype)


class Predictor(nnx.Module):
    """The MLP that predicts view 1's decoder tokens from view 2's."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        norm: str,
        num_patches: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if norm not in PREDICTOR_NORMS:
            raise ValueError(f"norm={norm!r}, expected one of {PREDICTOR_NORMS}")
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        if norm == "batch_norm":
            self.norm = PositionBatchNorm(num_patches)
            self.activation = jax.nn.relu
        else:
            self.norm = LayerNorm(hidden, epsilon=1e-6, out_dtype=dtype, rngs=rngs)
            self.activation = gelu
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch patches width"]
    ) -> Float[Array, "batch patches width"]:
        return self.fc2(self.activation(self.norm(self.fc1(x))))


class ProjectionHead(nnx.Module):
    """Two layers before the contrastive loss (Chen et al. 2020, SimCLR)."""

    def __init__(
        self, width: int, dim: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.fc1 = Linear(width, width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... dim"]:
        return self.fc2(jax.nn.relu(self.fc1(x)))


class CrossScaleMAE(nnx.Module):
    """An MAE for two views, a cross-prediction network and an optional projection head.

    With `projection=None`, the contrastive loss uses the mean token itself.
    """

    def __init__(
        self, mae: MAE, predictor: Predictor, projection: ProjectionHead | None = None
    ):
        self.mae = mae
        self.predictor = predictor
        self.projection = projection

    @property
    def encoder(self) -> Encoder:
        """The part that is exported."""
        return self.mae.encoder

    def parts(self) -> dict[str, nnx.Module]:
        """The networks that it consists of, by name."""
        parts = {**self.mae.parts(), "predictor": self.predictor}
        if self.projection is not None:
            parts["projection"] = self.projection
        return parts

    def noise_size(self, height: int, width: int) -> int:
        """The number of uniform numbers that decide the mask of a view."""
        return self.mae.noise_size(height, width)

    def __call__(
        self, views: Views, noise: Float[Array, "batch two patches"]
    ) -> CrossScaleMAEOutput:
        """Runs the MAE on both views, then the two heads."""
        output = self.mae(views, noise)
        # The mean of the visible patch tokens, without the class token.
        embedding = output.encoder_tokens[:, :, 1:].astype(jnp.float32).mean(axis=2)
        if self.projection is not None:
            embedding = self.projection(embedding.astype(output.encoder_tokens.dtype))
        return CrossScaleMAEOutput(
            **{f.name: getattr(output, f.name) for f in dataclasses.fields(output)},
            embedding=embedding,
            predicted_tokens=self.predictor(output.decoder_tokens[:, 1, 1:]),
        )
