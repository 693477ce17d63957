"""LayerNorm with a handwritten gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnames=("epsilon", "out_dtype"))
def layer_norm(
    x: Float[Array, "... width"],
    scale: Float[Array, " width"],
    bias: Float[Array, " width"],
    epsilon: float,
    out_dtype: jnp.dtype,
) -> Float[Array, "... width"]:
    """Normalises rows by mean and deviation (Ba et al. 2016), then scales and shifts.

    It computes in float32 and casts the result to `out_dtype`. The gradient recomputes
    the two statistics of each row from `x`.
    """
    normed, _ = _normed(x, epsilon)
    scale, bias = _for_rows(scale, x), _for_rows(bias, x)
    return (normed * scale + bias).astype(out_dtype)


def _for_rows(vector, x):
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def _normed(x, epsilon, barrier=lambda statistics: statistics):
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    mean, deviation = barrier((mean, jax.lax.rsqrt(variance + epsilon)))
    return (x - mean) * deviation, deviation


def _forward(x, scale, bias, epsilon, out_dtype):
    return layer_norm(x, scale, bias, epsilon, out_dtype), (x, scale)


def _backward(epsilon, out_dtype, saved, out_bar):
    x, scale = saved
    # With the statistics as separate arrays, XLA sums over rows while it reads `x`.
    # Without the barrier, on GPUs, it first writes all summands in float32.
    normed, deviation = _normed(x, epsilon, jax.lax.optimization_barrier)
    out_bar = out_bar.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    normed_bar = out_bar * _for_rows(scale, x)
    x_bar = deviation * (
        normed_bar
        - normed_bar.mean(axis=-1, keepdims=True)
        - normed * (normed_bar * normed).mean(axis=-1, keepdims=True)
    )
    scale_bar, bias_bar = (out_bar * normed).sum(rows), out_bar.sum(rows)
    return x_bar.astype(x.dtype), scale_bar, bias_bar  # parameters are float32


layer_norm.defvjp(_forward, _backward)
