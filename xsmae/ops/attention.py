"""Attention over the packed output of a query-key-value projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from einops import rearrange

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    qkv: Float[Array, "batch tokens three_width"],
    *,
    num_heads: int,
    implementation: str = "xla",
) -> Float[Array, "batch tokens width"]:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5.

    `qkv` holds queries, keys and values one after the other along its last axis, each
    with its heads one after the other (timm's layout). The softmax is computed in
    float32 whatever the dtype of `qkv`. `implementation` is one of `IMPLEMENTATIONS`;
    `cudnn` needs an NVIDIA GPU and 16-bit inputs.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: implementation={implementation!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    query, key, value = rearrange(
        qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads
    )
    out = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    return rearrange(out, "b n h d -> b n (h d)")
