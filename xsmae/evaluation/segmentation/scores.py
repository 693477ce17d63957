"""The metrics of semantic segmentation, and their intervals.

Every metric follows from three counts per class: pixels that are rightly of the class,
pixels that are truly of it, and pixels that are predicted as it. The counts of images
add up, so a confusion matrix per image is enough for all intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.mask_classes import IGNORE
from xsmae.evaluation.intervals import LEVEL, RESAMPLES

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

METRICS = ("miou", "accuracy", "mean_accuracy", "weighted_iou")
AT_ONCE = 100  # resamples in memory


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics in 0-1 of some images, or [resamples] of each.

    miou: the mean IoU over the classes with a union, so absent classes do not count.
    accuracy: of all pixels. mean_accuracy: the mean over the classes with true pixels.
    weighted_iou: IoUs weighted by their share of true pixels. iou: of each class, NaN
    without a union.
    """

    miou: Float[np.ndarray, ...]
    accuracy: Float[np.ndarray, ...]
    mean_accuracy: Float[np.ndarray, ...]
    weighted_iou: Float[np.ndarray, ...]
    iou: Float[np.ndarray, "... classes"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The low and the high end of each metric's interval; NaN where it has none."""

    low: Scores
    high: Scores


def confusion(
    mask: Int[np.ndarray, "height width"],
    predicted: Int[np.ndarray, "height width"],
    num_classes: int,
) -> Int[np.ndarray, "classes classes"]:
    """Counts [true class, predicted class] of one image; `IGNORE` does not count.

    Raises ValueError if a mask or a prediction has another class.
    """
    if mask.shape != predicted.shape:
        raise ValueError(f"a prediction of {predicted.shape}, a mask of {mask.shape}")
    counted = mask != IGNORE
    true, found = (x[counted].astype(np.int64) for x in (mask, predicted))
    for name, classes in (("mask", true), ("prediction", found)):
        if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(
                f"a {name} with classes {classes.min()} to {classes.max()}, expected 0 "
                f"to {num_classes - 1}"
            )
    pairs = np.bincount(true * num_classes + found, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def scores(confusions: Int[np.ndarray, "*images classes classes"]) -> Scores:
    """The metrics of one confusion matrix, or of the sum over images.

    Raises ValueError if no pixel counts.
    """
    counts = _counts(confusions).sum(axis=tuple(range(confusions.ndim - 2)))
    if not counts.any():
        raise ValueError("no pixel counts: every mask is ignored everywhere")
    return _scores(counts)


def bootstrap(
    confusions: Int[np.ndarray, "images classes classes"],
    *,
    seed: int,
    scenes: Sequence[str | int] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile bootstrap intervals of all metrics, over images.

    scenes: the parent scene of each image. If given, whole scenes are drawn, since
    images of one scene are alike. A resample in which a metric has no value does not
    count for that metric.
    """
    counts = _counts(confusions).astype(np.float64)
    if scenes is not None:
        _, scene = np.unique(np.asarray(scenes), return_inverse=True)
        images, counts = counts, np.zeros((scene.max() + 1, *counts.shape[1:]))
        np.add.at(counts, scene, images)
    rng, number = np.random.default_rng(seed), len(counts)
    flat, found = counts.reshape(number, -1), []
    for start in range(0, resamples, AT_ONCE):
        # How often each image occurs among as many draws with replacement.
        size = min(AT_ONCE, resamples - start)
        drawn = rng.multinomial(number, np.full(number, 1 / number), size=size)
        found.append(_scores((drawn @ flat).reshape(size, *counts.shape[1:])))
    ends = [(1 - level) / 2, (1 + level) / 2]
    values = {
        name: _quantiles(np.concatenate([getattr(part, name) for part in found]), ends)
        for name in (*METRICS, "iou")
    }
    low, high = (Scores(**{n: v[end] for n, v in values.items()}) for end in (0, 1))
    return Interval(low, high)


def _counts(
    confusions: Int[np.ndarray, "*images classes classes"],
) -> Int[np.ndarray, "*images 3 classes"]:
    """The right, the true and the predicted pixels of each class."""
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    return np.stack([right, confusions.sum(-1), confusions.sum(-2)], axis=-2)


def _scores(counts: Shaped[np.ndarray, "*resamples 3 classes"]) -> Scores:
    right, true, predicted = np.moveaxis(counts, -2, 0)
    iou, recall = _ratio(right, true + predicted - right), _ratio(right, true)
    share = _ratio(true, true.sum(axis=-1, keepdims=True))
    return Scores(
        miou=_mean(iou),
        accuracy=_ratio(right.sum(axis=-1), true.sum(axis=-1)),
        mean_accuracy=_mean(recall),
        # A class without true pixels has no weight, whatever its IoU is.
        weighted_iou=(share * np.where(true > 0, iou, 0)).sum(axis=-1),
        iou=iou,
    )


def _ratio(part, whole):
    """`part` / `whole`, NaN where the whole is empty."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values):
    """The mean over the classes that have a value; NaN if none has."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def _quantiles(values, ends):
    """Of each column, over the rows that have a value."""
    columns = values.reshape(len(values), -1)
    found = np.full((len(ends), columns.shape[1]), np.nan)
    for index, column in enumerate(columns.T):
        known = column[~np.isnan(column)]
        if len(known):
            found[:, index] = np.quantile(known, ends)
    return found.reshape(len(ends), *values.shape[1:])
