"""How sure a number is: bootstrap intervals over the test images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 2000


def bootstrap_interval(
    scores: Float[np.ndarray, " n"],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of one score per test image.

    Efron and Tibshirani 1993, chapter 13. For an accuracy the scores are 0 or 1, for an
    average over scales the mean over an image's scales. The order of the images does
    not matter. Where all scores are equal the interval has no width.
    """
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    rng = np.random.default_rng(seed)
    # How often each distinct score is drawn in n draws with replacement: the same
    # distribution as drawing images, without n numbers a resample.
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    means = drawn @ values / counts.sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
