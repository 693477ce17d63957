"""Principal components of vectors, as colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from xsmae.scenes.sample import Sample

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

COUNT = 3  # red, green, blue
STRETCH = (2, 98)  # percentiles that become the darkest and the brightest
DARKEST, BRIGHTEST = 1, 255  # 0 is nodata
FLAT = 1e-9  # variance of a component that is the same everywhere


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """The directions of greatest variance, and the range of each that is shown.

    variance: the part of the whole variance that each has. low, high: what is darkest
    and brightest. count: vectors that were looked at.
    """

    mean: Float[np.ndarray, " width"]
    axes: Float[np.ndarray, "components width"]
    variance: Float[np.ndarray, " components"]
    low: Float[np.ndarray, " components"]
    high: Float[np.ndarray, " components"]
    count: int

    def scores(
        self, vectors: Float[np.ndarray, "n width"]
    ) -> Float[np.ndarray, "n components"]:
        """How far vectors are along each direction."""
        return (vectors - self.mean) @ self.axes.T

    def colours(
        self, vectors: Float[np.ndarray, "n width"]
    ) -> UInt8[np.ndarray, "n 3"]:
        """Red, green and blue; a component without variance is in the middle."""
        span = self.high - self.low
        part = (self.scores(vectors) - self.low) / np.where(span > 0, span, 1)
        part = np.where(span > 0, part.clip(0, 1), 0.5)
        return np.rint(DARKEST + (BRIGHTEST - DARKEST) * part).astype(np.uint8)


def fit_components(blocks: Iterable[Float[np.ndarray, "n width"]]) -> Components:
    """The components of all vectors, in the memory of a block and a sample.

    The range that is shown is that of the sample.
    """
    count, mean, scatter, sample = 0, 0.0, 0.0, None
    for block in blocks:
        if sample is None:
            sample = Sample(block.shape[1])
        sample.add(block)
        # Chan's update: sums of squares about the mean lose no digits.
        part = block.astype(np.float64)
        own = part.mean(axis=0)
        part -= own
        apart, total = own - mean, count + len(part)
        scatter = scatter + part.T @ part
        scatter += np.outer(apart, apart) * (count * len(part) / total)
        mean = mean + apart * (len(part) / total)
        count = total
    variance, axes = np.linalg.eigh(scatter / count)
    variance, axes = variance[::-1][:COUNT], axes.T[::-1][:COUNT]
    # A direction and its opposite are the same: the greatest number is positive.
    greatest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    axes = axes * np.sign(greatest)
    varies = variance > FLAT
    scores = (sample.vectors - mean) @ axes.T
    low, high = np.percentile(scores, STRETCH, axis=0)
    whole = max(np.trace(scatter) / count, FLAT)
    return Components(
        mean=mean,
        axes=axes,
        variance=np.where(varies, variance / whole, 0.0),
        low=low,
        high=np.where(varies, high, low),
        count=count,
    )
