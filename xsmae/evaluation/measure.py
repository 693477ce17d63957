"""Turns predictions into result rows, for every task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xsmae.data.records import labels_of
from xsmae.errors import UserError
from xsmae.evaluation.cache import Features, cached_features
from xsmae.evaluation.features import standardize
from xsmae.evaluation.intervals import LEVEL, RESAMPLES, bootstrap_interval
from xsmae.evaluation.kept import describe_training, keep_classifier
from xsmae.evaluation.parts import Parts, identical_images
from xsmae.evaluation.rows import (
    AVERAGE,
    Result,
    append_all,
    column,
    identity,
    now,
    read,
)
from xsmae.evaluation.rows import Protocol as ResultProtocol
from xsmae.evaluation.scales import Scale
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.process.environment import describe_environment
from xsmae.process.log import LOG
from xsmae.weights.classifier import TrainedClassifier

INTERVAL = {
    "method": "percentile bootstrap over test images",
    "level": LEVEL,
    "resamples": RESAMPLES,
}


class Predict(Protocol):
    """A classifier of frozen features. It never sees test labels."""

    def __call__(
        self,
        bank: np.ndarray,
        bank_labels: np.ndarray,
        queries: np.ndarray,
        *,
        num_classes: int,
    ) -> np.ndarray:
        """bank [n, width], labels [n], queries [m, width] -> predicted classes [m]."""


class Used(Protocol):
    """The images of a part that were used: `Features`, or `fit.Seen`.

    positions: [n], positions in the source. pixels: [n, 16] digests.
    """

    positions: np.ndarray
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A classifier's predictions for the test images, from one feature at one scale.

    predicted: [m], a class for each image of `test`. gsd_told, seconds,
    images_per_second, feature_scaling: see `Result`. trained() -> the classifier, to
    keep it; None if nothing was trained on an encoder.
    """

    feature: str
    feature_scaling: str
    predicted: np.ndarray
    train: Used
    test: Used
    gsd_told: float | None
    seconds: float | None
    images_per_second: float | None
    trained: Callable[[], TrainedClassifier] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One evaluation of one encoder; `measure` runs it.

    features: the encoder's features to measure. results: the file for the rows; None
    only returns them. outcomes(job, scale): one `Outcome` per feature, in order, such
    as `of_frozen_features`. out: the folder that gets a folder per new row, with its
    trained classifier; None keeps none. should_stop, say: see `cached_features`.
    """

    encoder: FrozenEncoder
    parts: Parts
    scales: Sequence[Scale]
    protocol: ResultProtocol
    features: Sequence[str]
    seed: int
    outcomes: Callable[[Measurement, Scale], Iterable[Outcome]]
    results: Path | None
    cache: Path
    batch_size: int = 64
    out: Path | None = None
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = LOG.info


def measure(job: Measurement) -> list[Result]:
    """One row per feature and scale, added to `job.results`.

    With several scales, one row per feature averages over them. If the file already has
    all rows, nothing is computed. Raises what `job.outcomes` raises.
    """
    encoder = describe_subject(job)
    percents, sizes = zip(*((s.percent, s.size) for s in job.scales), strict=True)
    columns = [column(*pair) for pair in zip(percents, sizes, strict=True)]
    if len(columns) > 1:
        columns.append(column(AVERAGE, list(sizes), list(percents)))
    wanted = [
        identity(job.protocol, encoder, feature, place, job.seed)
        for feature in job.features
        for place in columns
    ]
    known = known_rows(job, wanted)
    if all(one in known for one in wanted):
        return [known[one] for one in wanted]
    beside = None
    rows, correct = [], {feature: [] for feature in job.features}
    for scale in job.scales:
        for outcome in job.outcomes(job, scale):
            row, right = row_of(job, encoder, scale, outcome)
            if job.out and outcome.trained and row.identity not in known:
                folder = job.out / row.identity
                told = describe_training(job.encoder, job.protocol, scale, job.seed)
                keep_classifier(folder, outcome.trained(), row, scale, told, beside)
                beside = folder
                row = dataclasses.replace(row, files=str(folder))
            rows.append(row)
            correct[outcome.feature].append(right)
    if len(job.scales) > 1:
        for feature in job.features:
            of_feature = [row for row in rows if row.feature == feature]
            rows.append(average(job, of_feature, np.mean(correct[feature], axis=0)))
    if job.results:
        append_all(job.results, rows)
    return rows


def known_rows(job: Measurement, wanted: Sequence[str]) -> dict[str, Result]:
    """The rows of `job.results` by identity; says so if it has all of `wanted`."""
    known = {row.identity: row for row in read(job.results)} if job.results else {}
    if all(one in known for one in wanted):
        job.say(
            f"{job.encoder.name}: {job.results} already has its rows for this "
            "protocol; to measure again, remove them or give another --results"
        )
    return known


def of_frozen_features(
    job: Measurement, scale: Scale, *, predict: Predict
) -> Iterator[Outcome]:
    """The outcomes of `predict` on frozen features, which are extracted once."""
    train, test = features_of(job, scale)
    for feature in job.features:
        predicted = predictions(job, feature, train, test, predict=predict)
        yield outcome_of(job, feature, predicted, train, test)


def outcome_of(
    job: Measurement,
    feature: str,
    predicted: np.ndarray,
    train: Features,
    test: Features,
) -> Outcome:
    """The outcome of predictions from frozen features."""
    gsd = np.concatenate([train.gsd, test.gsd])
    computed, seconds = train.computed + test.computed, train.seconds + test.seconds
    standardized = job.encoder.standardize
    return Outcome(
        feature=feature,
        feature_scaling="standardised by the training part" if standardized else "none",
        predicted=predicted,
        train=train,
        test=test,
        gsd_told=float(np.median(gsd)) if job.encoder.reads_gsd else None,
        seconds=seconds if computed else None,
        images_per_second=computed / seconds if computed else None,
    )


def predictions(
    job: Measurement, feature: str, train: Features, test: Features, *, predict: Predict
) -> np.ndarray:
    """The predicted class of every test image. Uses no test label."""
    bank, queries = train.feature(feature), test.feature(feature)
    if job.encoder.standardize:
        bank, queries = standardize(bank, queries)
    return predict(
        bank,
        labels_of(job.parts.train, train.positions),
        queries,
        num_classes=len(job.parts.class_names),
    )


def features_of(job: Measurement, scale: Scale) -> tuple[Features, Features]:
    """The features of the training and the test part at a scale."""
    at = f"{scale.percent:g} % ({scale.size} px)"
    return tuple(
        cached_features(
            job.encoder,
            getattr(job.parts, part),
            scale,
            cache=job.cache,
            batch_size=job.batch_size,
            title=f"{job.encoder.name}, {part} at {at}",
            should_stop=job.should_stop,
            say=job.say,
        )
        for part in ("train", "test")
    )


def row_of(
    job: Measurement, encoder: Mapping[str, Any], scale: Scale, outcome: Outcome
) -> tuple[Result, np.ndarray]:
    """A row, and 1 or 0 for each test image: right or wrong."""
    parts, train, test = job.parts, outcome.train, outcome.test
    labels, names = labels_of(parts.test, test.positions), parts.class_names
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels, outcome.predicted), 1)
    right = (outcome.predicted == labels).astype(np.float64)
    low, high = bootstrap_interval(right, seed=job.seed)
    row = Result(
        protocol=job.protocol,
        encoder=encoder,
        feature=outcome.feature,
        feature_scaling=outcome.feature_scaling,
        scale=scale.percent,
        size=scale.size,
        gsd_told=outcome.gsd_told,
        seed=job.seed,
        value=float(right.mean()),
        low=low,
        high=high,
        class_names=list(names),
        # A class without test images has no accuracy, so it is left out.
        per_class={
            name: float(row[index] / row.sum())
            for index, (name, row) in enumerate(zip(names, confusion, strict=True))
            if row.sum()
        },
        confusion=confusion.tolist(),
        num_train=len(train.positions),
        num_test=len(test.positions),
        unusable={
            "train": len(parts.train) - len(train.positions),
            "test": len(parts.test) - len(test.positions),
        },
        leaks=leaks(parts, train, test),
        seconds=outcome.seconds,
        images_per_second=outcome.images_per_second,
        run=describe_run(),
    )
    return row, right


def average(job: Measurement, rows: list[Result], right: np.ndarray) -> Result:
    """The mean over the scales. The bootstrap draws an image with all its scales.

    right: [images], the part of the scales at which an image is right.
    """
    low, high = bootstrap_interval(right, seed=job.seed)
    told = [row.gsd_told for row in rows]
    return dataclasses.replace(
        rows[-1],
        scale=AVERAGE,
        scales=[row.scale for row in rows],
        size=[row.size for row in rows],
        gsd_told=None if None in told else told,
        value=float(right.mean()),
        low=low,
        high=high,
        per_class={
            name: float(np.mean([row.per_class[name] for row in rows]))
            for name in rows[0].per_class
        },
        confusion=None,
        seconds=None,
        images_per_second=None,
        files=None,
    )


def leaks(parts: Parts, train: Used, test: Used) -> dict[str, Any]:
    """How many test images have the pixels of a training image, and an example."""
    same = identical_images(train.pixels, test.pixels)
    found: dict[str, Any] = {"pixel_identical_test_images": len(same)}
    if same:
        row, other = same[0]
        found["example"] = {
            "test": parts.test.id(int(test.positions[row])),
            "train": parts.train.id(int(train.positions[other])),
        }
    return found


def check_features(encoder: FrozenEncoder, wanted: Sequence[str]) -> list[str]:
    """The features to measure: `wanted` of an encoder, all of a pixel control."""
    if encoder.info is None:
        return list(encoder.features)
    unknown = [name for name in wanted if name not in encoder.features]
    if unknown or not wanted:
        raise UserError(
            f"feature={','.join(wanted)}, expected one or both of "
            f"{','.join(encoder.features)}"
        )
    return list(wanted)


def describe_subject(job: Measurement) -> dict[str, Any]:
    """`Result.encoder`; `bands` are those it reads of rasters."""
    encoder, source = job.encoder, job.parts.train
    info, bands = encoder.info or {}, {}
    if source.dtype != "uint8":
        reading = encoder.reading
        bands["bands"] = list(reading.used if reading else source.bands)
    return {
        "name": encoder.name,
        "kind": encoder.kind,
        "digest": encoder.digest,
        "origin": dict(encoder.origin),
        "normalization": encoder.normalization,
        "architecture": info.get("architecture"),
        "pooling": info.get("pooling"),
        **({"gsd_range": info["gsd_range"]} if "gsd_range" in info else {}),
        **bands,
    }


def describe_run() -> dict[str, Any]:
    """`Result.run`: the time, the versions and the devices."""
    found = describe_environment()
    kept = ("python", "platform", "versions", "devices", "git_revision", "command")
    return {"time": now(), **{name: found[name] for name in kept}}
