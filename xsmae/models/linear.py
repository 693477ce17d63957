"""Linear classifiers of features: the last layers of probes and of fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.models.vit import LayerNorm

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class BatchNormLinear(nnx.Module):
    """Batch norm without scale and bias, then a linear layer (MoCo v3's, MAE's).

    The running variance averages biased variances; PyTorch averages unbiased ones. At
    the published batch of 512 the difference is 0.2 %.
    """

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
        self.head = _linear(width, num_classes, head_std, rngs)

    def scores(
        self, features: Float[Array, "*batch width"], *, training: bool
    ) -> Float[Array, "*batch classes"]:
        """Scores. Training uses the batch's statistics, prediction the running ones."""
        return self.head(self.norm(features, use_running_average=not training))


class LinearProbe(BatchNormLinear):
    """The published linear probe, of one feature per image."""

    def __call__(
        self, features: Float[Array, "batch width"], *, training: bool
    ) -> Float[Array, "batch classes"]:
        """See `scores`."""
        return self.scores(features, training=training)


class PooledLinear(nnx.Module):
    """The linear layer of fine-tuning, of pooled tokens.

    feature: `mean` has a LayerNorm `fc_norm` before the layer (MAE's global_pool),
    `cls` has none.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        feature: str,
        head_std: float,
        rngs: nnx.Rngs,
    ):
        if feature == "mean":
            self.fc_norm = LayerNorm(
                width, epsilon=1e-6, out_dtype=jnp.float32, rngs=rngs
            )
        else:
            self.fc_norm = None
        self.head = _linear(width, num_classes, head_std, rngs)

    def scores(
        self, pooled: Float[Array, "batch width"]
    ) -> Float[Array, "batch classes"]:
        """Scores of pooled tokens."""
        return self.head(pooled if self.fc_norm is None else self.fc_norm(pooled))


@dataclasses.dataclass(frozen=True)
class LogisticRegression:
    """`features @ kernel + bias` of standardised features. penalty: the one of L2."""

    mean: Float[np.ndarray, " width"]
    std: Float[np.ndarray, " width"]
    kernel: Float[np.ndarray, "width classes"]
    bias: Float[np.ndarray, " classes"]
    penalty: float

    def scores(
        self, features: Float[np.ndarray, "n width"]
    ) -> Float[np.ndarray, "n classes"]:
        """Scores, computed by NumPy: the same on every device."""
        return (features - self.mean) / self.std @ self.kernel + self.bias

    def predict(self, features: Float[np.ndarray, "n width"]) -> np.ndarray:
        """The class with the highest score; the lowest class wins a tie."""
        return self.scores(features).argmax(axis=1)


def _linear(width: int, num_classes: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        width, num_classes, kernel_init=nnx.initializers.normal(std), rngs=rngs
    )
