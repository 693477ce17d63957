"""The exact GELU, with a gradient that needs only its input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.custom_jvp
def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """x times the normal cumulative distribution at x (Hendrycks 2016).

    This is not the tanh approximation. It uses erf in the dtype of `x`, like PyTorch.
    jax.nn.gelu uses erfc and keeps intermediate values for the gradient.
    """
    return x * _cumulative(x)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    probability = _cumulative(x)
    density = jnp.exp(-0.5 * jnp.square(x)) * _constant(x, 1 / math.sqrt(2 * math.pi))
    return x * probability, (probability + x * density) * x_dot


def _cumulative(x):
    return 0.5 * (1 + jax.lax.erf(x * _constant(x, math.sqrt(0.5))))


def _constant(x, value: float):
    return jnp.asarray(value, x.dtype)
