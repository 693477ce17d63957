"""Classes of vectors that are alike: k-means, the same at each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xsmae.errors import UserError
from xsmae.scenes.sample import SEED

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STARTS = 4  # of which the best one counts
ROUNDS = 100  # at most
GAIN = 1e-4  # of the squared distances; a round that gains less is the last
BLOCK = 2**16  # vectors that are compared with all centres at a time
SAME = 1e-9  # squared distance of vectors that do not differ


def fit_centres(
    vectors: Float[np.ndarray, "n width"], count: int
) -> Float[np.ndarray, "classes width"]:
    """The centres of `count` classes, that of the largest class first.

    The best of several starts with k-means++. Raises UserError if there are too few
    different vectors.
    """
    random = np.random.default_rng(SEED)
    found = [_fit(vectors, _start(vectors, count, random)) for _ in range(STARTS)]
    centres = min(found, key=lambda both: both[1])[0]
    sizes = np.bincount(nearest_centres(vectors, centres), minlength=count)
    return centres[np.argsort(-sizes, kind="stable")]


def nearest_centres(
    vectors: Float[np.ndarray, "n width"], centres: Float[np.ndarray, "classes width"]
) -> Int[np.ndarray, " n"]:
    """The class of each vector."""
    return _nearest(vectors, centres)[0]


def _nearest(vectors, centres) -> tuple[np.ndarray, np.ndarray]:
    """The class of each vector; the squared distance to its centre less its square."""
    squares, twice = (centres**2).sum(axis=1), 2 * centres.T
    parts = []
    for start in range(0, max(len(vectors), 1), BLOCK):
        away = squares - vectors[start : start + BLOCK] @ twice
        parts.append((away.argmin(axis=1), away.min(axis=1)))
    classes, away = zip(*parts, strict=True)
    return np.concatenate(classes), np.concatenate(away)


def _start(vectors, count, random) -> np.ndarray:
    """Centres that are far from each other: k-means++."""
    centres = [vectors[random.integers(len(vectors))]]
    away = np.full(len(vectors), np.inf)
    while True:
        away = np.minimum(away, ((vectors - centres[-1]) ** 2).sum(axis=1))
        away = np.where(away > SAME, away, 0)
        if len(centres) == count:
            return np.array(centres, np.float32)
        if not away.any():
            raise UserError(
                f"classes={count}, but only {len(centres)} vectors differ: give fewer "
                "--classes"
            )
        chance = np.cumsum(away, dtype=np.float64)
        place = np.searchsorted(chance, random.random() * chance[-1], side="right")
        centres.append(vectors[min(place, len(vectors) - 1)])


def _fit(vectors, centres) -> tuple[np.ndarray, float]:
    """Centres after Lloyd's rounds, and the sum of squared distances to them."""
    squares = (vectors**2).sum(axis=1)
    before = np.inf
    for _ in range(ROUNDS):
        classes, away = _nearest(vectors, centres)
        away = np.maximum(away + squares, 0)
        total = float(away.sum(dtype=np.float64))
        own = classes[:, None] == np.arange(len(centres))
        sizes = own.sum(axis=0)
        if sizes.all() and before - total <= GAIN * total:
            break
        before = total
        sums = own.T.astype(np.float32) @ vectors
        centres = sums / np.maximum(sizes, 1)[:, None].astype(np.float32)
        # A class that lost all its vectors begins again at the farthest one.
        for i in np.flatnonzero(sizes == 0):
            centres[i] = vectors[away.argmax()]
            away[away.argmax()] = 0
    return centres, total
