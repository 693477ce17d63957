"""Attention as a few matrix products, which XLA compiles for any platform."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnames=("num_heads",))
def plain_attention(
    qkv: Float[Array, "batch tokens three_width"], num_heads: int
) -> Float[Array, "batch tokens width"]:
    """Attention as a few products. The gradient recomputes the scores from `qkv`.

    MAE's sequences are short. On CPUs, recomputing costs less than writing and reading
    the scores and the split `qkv` (benchmarks/RESULTS.md).
    """
    query, key, value = _split(qkv, num_heads)
    out = jnp.einsum("bhnm,bhmd->bhnd", _probabilities(query, key), value)
    return rearrange(out, "b h n d -> b n (h d)")


def _forward(qkv, num_heads):
    return plain_attention(qkv, num_heads), qkv


def _backward(num_heads, qkv, out_bar):
    query, key, value = _split(qkv, num_heads)
    probabilities = _probabilities(query, key)
    out_bar = rearrange(out_bar, "b n (h d) -> b h n d", h=num_heads)
    value_bar = jnp.einsum("bhnm,bhnd->bhmd", probabilities, out_bar)
    # The softmax's gradient is computed in float32, like the softmax.
    wide = probabilities.astype(jnp.float32)
    wide_bar = _scores(out_bar, value)
    weighted = (wide * wide_bar).sum(axis=-1, keepdims=True)
    scores_bar = wide * (wide_bar - weighted) * query.shape[-1] ** -0.5
    scores_bar = scores_bar.astype(qkv.dtype)
    query_bar = jnp.einsum("bhnm,bhmd->bhnd", scores_bar, key)
    key_bar = jnp.einsum("bhnm,bhnd->bhmd", scores_bar, query)
    qkv_bar = jnp.stack([query_bar, key_bar, value_bar])
    return (rearrange(qkv_bar, "three b h n d -> b n (three h d)"),)


plain_attention.defvjp(_forward, _backward)


def _split(qkv, num_heads):
    return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)


def _scores(query, key):
    return jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)


def _probabilities(query, key):
    scores = _scores(query, key) * query.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)
