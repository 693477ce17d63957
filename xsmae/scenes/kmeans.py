"""Classes of vectors that are alike: k-means, the same at each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.cluster import vq

from xsmae.errors import UserError
from xsmae.scenes.sample import SEED

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STARTS = 4  # the best one counts
GAIN = 1e-5  # of the mean distance to a centre; a round that gains less is the last


def fit_centres(
    vectors: Float[np.ndarray, "n width"], count: int
) -> Float[np.ndarray, "classes width"]:
    """The centres of `count` classes, that of the largest class first.

    The best of several starts with k-means++. Raises UserError if there are too few
    different vectors.
    """
    different = len(np.unique(vectors, axis=0))
    if different < count:
        raise UserError(
            f"classes={count}, but only {different} vectors differ: give fewer "
            "--classes"
        )
    random = np.random.default_rng(SEED)
    found = []
    for _ in range(STARTS):
        start, _ = vq.kmeans2(vectors, count, iter=1, minit="++", rng=random)
        found.append(vq.kmeans(vectors, start, thresh=GAIN))
    # A class that lost all its vectors is gone: more classes come first.
    centres = min(found, key=lambda both: (-len(both[0]), both[1]))[0]
    sizes = np.bincount(nearest_centres(vectors, centres), minlength=len(centres))
    return centres[np.argsort(-sizes, kind="stable")]


def nearest_centres(
    vectors: Float[np.ndarray, "n width"], centres: Float[np.ndarray, "classes width"]
) -> Int[np.ndarray, " n"]:
    """The class of each vector."""
    return vq.vq(vectors, centres)[0]
