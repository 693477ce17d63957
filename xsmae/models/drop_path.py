"""Stochastic depth: drops residual branches of random samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key


def drop_path_scales(
    key: Key[Array, ""], *, rate: float, depth: int, batch: int
) -> Float[Array, "depth 2 batch"]:
    """The factors of all residual branches in stochastic depth (Huang et al. 2016).

    A factor is 0 with a probability p that rises linearly from 0 in the first block to
    `rate` in the last. Otherwise it is 1 / (1 - p), which keeps the expectation.
    Factors are independent for each sample, and for attention and MLP (timm's DropPath,
    MAE's models_vit.py).
    """
    keep = 1 - jnp.linspace(0.0, rate, depth)[:, None, None]
    kept = jax.random.bernoulli(key, keep, (depth, 2, batch))
    return jnp.where(kept, 1 / keep, 0.0)
