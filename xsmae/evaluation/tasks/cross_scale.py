"""kNN across scales: the bank at one scale, the queries at another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.data.records import labels_of
from xsmae.errors import UserError
from xsmae.evaluation.cache import Features
from xsmae.evaluation.intervals import bootstrap_interval
from xsmae.evaluation.measure import (
    Measurement,
    Predict,
    average,
    describe_subject,
    features_of,
    known_rows,
    outcome_of,
    predictions,
    row_of,
)
from xsmae.evaluation.rows import AVERAGE, Result, append_all, column, identity

if TYPE_CHECKING:
    from jaxtyping import Bool

# Of each scale, the features of the training and of the test part.
Parts = Sequence[tuple[Features, Features]]


def measure_across(job: Measurement, *, predict: Predict) -> list[Result]:
    """One row per feature, added to `job.results`, with a cell per pair of scales.

    `cells`: the accuracies, [scale of the bank][scale of the queries]. The cells of the
    diagonal are the accuracies of kNN at one scale. `metrics`: the means of the cells
    on the diagonal and off it. The row's value is the one off the diagonal. Features
    are extracted once per scale, into the cache of `knn`. If the file already has all
    rows, nothing is computed. Raises UserError if the scales have different images.
    """
    encoder = describe_subject(job)
    percents, sizes = zip(*((s.percent, s.size) for s in job.scales), strict=True)
    place = column(AVERAGE, list(sizes), list(percents))
    wanted = [
        identity(job.protocol, encoder, feature, place, job.seed)
        for feature in job.features
    ]
    known = known_rows(job, wanted)
    if all(one in known for one in wanted):
        return [known[one] for one in wanted]
    parts = [features_of(job, scale) for scale in job.scales]
    _check_same_images(job, parts)
    rows = [_row(job, encoder, feature, parts, predict) for feature in job.features]
    if job.results:
        append_all(job.results, rows)
    return rows


def _check_same_images(job: Measurement, parts: Parts) -> None:
    """Raise UserError if an image was readable for some of the scales only."""
    for scale, of_scale in zip(job.scales, parts, strict=True):
        pairs = zip(of_scale, parts[0], strict=True)
        if not all(np.array_equal(a.positions, b.positions) for a, b in pairs):
            raise UserError(
                f"{job.encoder.name} has other images at {scale.percent:g} % than at "
                f"{job.scales[0].percent:g} %, expected the same: some could not be "
                "read once; give another --cache"
            )


def _row(
    job: Measurement,
    encoder: Mapping[str, Any],
    feature: str,
    parts: Parts,
    predict: Predict,
) -> Result:
    """The row of a feature. The bootstrap draws an image with all its cells."""
    labels = labels_of(job.parts.test, parts[0][1].positions)
    diagonal, right = [], []
    for place, (scale, (train, _)) in enumerate(zip(job.scales, parts, strict=True)):
        for other, (_, test) in enumerate(parts):
            predicted = predictions(job, feature, train, test, predict=predict)
            right.append(predicted == labels)
            if place == other:
                outcome = outcome_of(job, feature, predicted, train, test)
                diagonal.append(row_of(job, encoder, scale, outcome)[0])
        job.say(f"{job.encoder.name}, {feature}: bank at {scale.percent:g} % compared")
    right = np.reshape(right, (len(parts), len(parts), -1))
    own = np.eye(len(parts), dtype=bool)
    scores = right[~own].mean(axis=0)

    def interval(right: Bool[np.ndarray, "*cells images"]) -> list[float]:
        scores = right.reshape(-1, right.shape[-1]).mean(axis=0)
        return [float(scores.mean()), *bootstrap_interval(scores, seed=job.seed)]

    return dataclasses.replace(
        average(job, diagonal, scores),
        per_class={
            name: float(scores[labels == label].mean())
            for label, name in enumerate(job.parts.class_names)
            if (labels == label).any()
        },
        metrics={
            "diagonal": interval(right[own]),
            "off_diagonal": interval(right[~own]),
        },
        cells=[[interval(cell) for cell in of_bank] for of_bank in right],
    )
