"""Exact search by cosine similarity, chunk by chunk on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from xsmae.scenes.stored import Chunk, unit

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames="many")
def _merge(scores, found, numbers, rows, queries, *, many):
    """The best of what was found so far and of a chunk; of equals the earlier row."""
    vectors = numbers.astype(jnp.float32)
    length = jnp.linalg.norm(vectors, axis=1)
    # The default precision of some devices is that of bfloat16.
    near = jnp.dot(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    near = near / jnp.where(length > 0, length, 1)[None]
    rows = jnp.broadcast_to(rows[None], near.shape)
    near = jnp.where((rows >= 0) & jnp.isfinite(near), near, -jnp.inf)
    scores = jnp.concatenate([scores, near], axis=1)
    found = jnp.concatenate([found, rows], axis=1)
    scores, places = jax.lax.top_k(scores, many)
    return scores, jnp.take_along_axis(found, places, axis=1)


def nearest(
    chunks: Iterable[Chunk], queries: Float[np.ndarray, "queries width"], many: int
) -> tuple[Float[np.ndarray, "queries many"], Int[np.ndarray, "queries many"]]:
    """The highest cosines of each query, and their rows; -1 where there are too few.

    Memory on the device is that of a chunk. The cosine of a vector of zeros is 0.
    """
    queries = jnp.asarray(unit(np.asarray(queries, np.float32)))
    scores: Float[Array, "queries many"] = jnp.full((len(queries), many), -jnp.inf)
    found: Int[Array, "queries many"] = jnp.full((len(queries), many), -1, jnp.int32)
    for chunk in chunks:
        before = scores
        scores, found = _merge(
            scores, found, chunk.numbers, chunk.rows, queries, many=many
        )
        # At most two chunks are in memory, however fast they are read.
        jax.block_until_ready(before)
    scores, found = np.asarray(scores), np.asarray(found)
    return scores, np.where(np.isfinite(scores), found, -1)
