"""Vectors as 8-bit numbers, and what that costs a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int8

NEIGHBOURS = 10
QUERIES, AMONG = 500, 10_000  # vectors of a comparison, at most


def quantize(
    vectors: Float[np.ndarray, "n width"],
) -> tuple[Int8[np.ndarray, "n width"], Float[np.ndarray, " n"]]:
    """Numbers from -127 to 127 and a scale for each row: value = number * scale."""
    greatest = np.abs(vectors).max(axis=1)
    scale = np.where(greatest > 0, greatest, 127).astype(np.float32) / np.float32(127)
    numbers = np.clip(np.rint(vectors / scale[:, None]), -127, 127)
    return numbers.astype(np.int8), scale


def recall(
    vectors: Float[np.ndarray, "n width"], stored: Float[np.ndarray, "n width"]
) -> float | None:
    """The part of each vector's 10 nearest that are still nearest as `stored`, 0 to 1.

    Nearest by cosine similarity, without the vector itself. None for fewer than two
    vectors.
    """
    if len(vectors) < 2:
        return None
    queries = np.arange(min(QUERIES, len(vectors))) * len(vectors)
    queries = queries // min(QUERIES, len(vectors))
    found = [_nearest(x.astype(np.float64), queries) for x in (vectors, stored)]
    same = [len(np.intersect1d(a, b)) for a, b in zip(*found, strict=True)]
    return float(np.mean(same) / found[0].shape[1])


def _nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length > 0, length, 1)
    similar = unit[queries] @ unit.T
    similar[np.arange(len(queries)), queries] = -np.inf
    many = min(NEIGHBOURS, len(vectors) - 1)
    return np.argsort(-similar, axis=1, kind="stable")[:, :many]
