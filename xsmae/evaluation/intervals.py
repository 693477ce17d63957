"""Bootstrap confidence intervals over the test images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 2000


def accuracy_interval(
    accuracy: float, images: int, *, seed: int
) -> tuple[float, float] | None:
    """The `bootstrap_interval` of an accuracy on so many images.

    None if no number of right ones gives it: some images were not used.
    """
    right = round(accuracy * images)
    if not math.isclose(accuracy * images, right, abs_tol=1e-6):
        return None
    scores = np.repeat([1.0, 0.0], [right, images - right])
    return bootstrap_interval(scores, seed=seed)


def bootstrap_interval(
    scores: Float[np.ndarray, " n"],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of one score per test image.

    Efron and Tibshirani 1993, chapter 13. For an accuracy, a score is 0 or 1. For an
    average over scales, it is the image's mean over the scales. The order of the images
    does not matter. If all scores are equal, the interval has zero width.
    """
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    rng = np.random.default_rng(seed)
    # Draw how often each distinct score occurs among n draws with replacement. The
    # distribution is the same as when images are drawn, with far fewer numbers.
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    means = drawn @ values / counts.sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
