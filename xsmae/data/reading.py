"""What surveys of a source share: reading ahead, and sums over an image's pixels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Read = TypeVar("Read")
AT_ONCE = 2**14  # pixels in float64: a whole scene of 100 MB would take 800 MB
THREADS = os.cpu_count() or 1


def read_ahead(
    load: Callable[[int], Read],
    indices: Sequence[int],
    *,
    ahead: int,
    should_stop: Callable[[], bool],
) -> Iterator[Read]:
    """`load` of every index, in order, by threads; `ahead`: most results that wait.

    Raises KeyboardInterrupt once `should_stop()` is true.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(indices), ahead):
            if should_stop():
                raise KeyboardInterrupt
            yield from pool.map(load, indices[start : start + ahead])


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """The pixels of an image that count, per band, float64; uint8 in 0-1.

    count: of those pixels. mean, square: the means of the values and of their squares,
    NaN without any. low, high: the smallest and the largest value.
    """

    count: int
    mean: np.ndarray
    square: np.ndarray
    low: np.ndarray
    high: np.ndarray


def moments(image: np.ndarray, valid: np.ndarray | None) -> Moments:
    """Of the pixels that are valid; None means all."""
    height, width, bands = image.shape
    unit = 255.0 if image.dtype == np.uint8 else 1.0
    sums, count = np.zeros((2, bands)), 0
    low, high = np.full(bands, np.inf), np.full(bands, -np.inf)
    rows = max(1, AT_ONCE // width)
    for top in range(0, height, rows):
        part = np.s_[top : top + rows]
        good = np.s_[:, :] if valid is None else valid[part]
        numbers = image[part][good].reshape(-1, bands)
        if len(numbers):
            values = numbers.astype(np.float64) / unit
            sums += values.sum(axis=0), np.square(values).sum(axis=0)
            count += len(numbers)
            low = np.minimum(low, values.min(axis=0))
            high = np.maximum(high, values.max(axis=0))
    mean, square = sums / count if count else np.full_like(sums, np.nan)
    return Moments(count, mean, square, low, high)


def mean_and_std(images: Sequence[Moments]) -> tuple[list[float], list[float]]:
    """Of each band, with equal image weights."""
    mean = np.mean([image.mean for image in images], axis=0)
    square = np.mean([image.square for image in images], axis=0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
