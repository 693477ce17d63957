"""The exact GELU, with a gradient that needs its input alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.custom_jvp
def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """x times the normal distribution's probability of less than x (Hendrycks 2016).

    Not the tanh that approximates it. Computed in the dtype of `x`, by erf, as PyTorch
    does; jax.nn.gelu takes erfc, whose parts it keeps for the gradient.
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
