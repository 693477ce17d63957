"""From features to result rows: what every evaluation of frozen features shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xsmae.errors import UserError
from xsmae.evaluation.cache import Features, cached_features
from xsmae.evaluation.features import standardize
from xsmae.evaluation.frozen import FrozenEncoder
from xsmae.evaluation.intervals import LEVEL, RESAMPLES, bootstrap_interval
from xsmae.evaluation.parts import Parts, identical_images, labels_of
from xsmae.evaluation.protocol import (
    AVERAGE,
    Result,
    append,
    column,
    identity,
    now,
    read,
)
from xsmae.evaluation.protocol import Protocol as ResultProtocol
from xsmae.evaluation.scales import Scale
from xsmae.workdir import describe_environment

INTERVAL = {
    "method": "percentile bootstrap over test images",
    "level": LEVEL,
    "resamples": RESAMPLES,
}


class Predict(Protocol):
    """A classifier of frozen features; it never sees a test label."""

    def __call__(
        self,
        bank: np.ndarray,
        bank_labels: np.ndarray,
        queries: np.ndarray,
        *,
        num_classes: int,
    ) -> np.ndarray:
        """bank [n, width], labels [n], queries [m, width] -> predicted classes [m]."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One evaluation of one encoder; `measure` runs it.

    features: which of the encoder's. results: the file the rows go to. `should_stop`
    and `say` as `cached_features` takes them.
    """

    encoder: FrozenEncoder
    parts: Parts
    scales: Sequence[Scale]
    protocol: ResultProtocol
    features: Sequence[str]
    seed: int
    predict: Predict
    results: Path
    cache: Path
    batch_size: int = 64
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda line: print(line, flush=True)


def measure(job: Measurement) -> list[Result]:
    """The rows of an encoder, a feature and a scale, added to `job.results`.

    Then their average over the scales, where there are several. Rows that are in the
    file already are not computed again. Raises what `cached_features` raises.
    """
    encoder = _describe(job.encoder)
    percents, sizes = zip(*((s.percent, s.size) for s in job.scales), strict=True)
    columns = [column(*pair) for pair in zip(percents, sizes, strict=True)]
    if len(columns) > 1:
        columns.append(column(AVERAGE, list(sizes), list(percents)))
    wanted = [
        identity(job.protocol, encoder, feature, place, job.seed)
        for feature in job.features
        for place in columns
    ]
    known = {row.identity: row for row in read(job.results)}
    if all(one in known for one in wanted):
        job.say(
            f"{job.encoder.name}: its rows of this protocol are in {job.results}; "
            "to measure again, remove them or give another --results"
        )
        return [known[one] for one in wanted]
    rows, correct = [], {feature: [] for feature in job.features}
    for scale in job.scales:
        train, test = (_features(job, part, scale) for part in ("train", "test"))
        shared = _shared(job, encoder, scale, train, test)
        for feature in job.features:
            row, right = _classify(job, shared, feature, train, test)
            rows.append(row)
            correct[feature].append(right)
    if len(job.scales) > 1:
        for feature in job.features:
            of_feature = [row for row in rows if row.feature == feature]
            rows.append(_average(job, of_feature, np.mean(correct[feature], axis=0)))
    for row in rows:
        append(job.results, row)
    return rows


def predictions(
    job: Measurement, feature: str, train: Features, test: Features
) -> np.ndarray:
    """The class of every test image, from features and the training labels alone."""
    bank, queries = train.feature(feature), test.feature(feature)
    if job.encoder.standardize:
        bank, queries = standardize(bank, queries)
    return job.predict(
        bank,
        labels_of(job.parts.train, train.positions),
        queries,
        num_classes=len(job.parts.class_names),
    )


def _features(job: Measurement, part: str, scale: Scale) -> Features:
    return cached_features(
        job.encoder,
        getattr(job.parts, part),
        scale,
        cache=job.cache,
        batch_size=job.batch_size,
        title=f"{job.encoder.name}, {part} at {scale.percent:g} % ({scale.size} px)",
        should_stop=job.should_stop,
        say=job.say,
    )


def _shared(
    job: Measurement,
    encoder: Mapping[str, Any],
    scale: Scale,
    train: Features,
    test: Features,
) -> dict[str, Any]:
    """What the rows of all features at a scale have in common."""
    gsd = np.concatenate([train.gsd, test.gsd])
    computed, seconds = train.computed + test.computed, train.seconds + test.seconds
    parts = job.parts
    return {
        "protocol": job.protocol,
        "encoder": encoder,
        "scale": scale.percent,
        "size": scale.size,
        "gsd_told": float(np.median(gsd)) if job.encoder.reads_gsd else None,
        "seed": job.seed,
        "num_train": len(train.positions),
        "num_test": len(test.positions),
        "unusable": {
            "train": len(parts.train) - len(train.positions),
            "test": len(parts.test) - len(test.positions),
        },
        "leaks": leaks(parts, train, test),
        "seconds": seconds if computed else None,
        "images_per_second": computed / seconds if computed else None,
        "run": _run(),
    }


def _classify(
    job: Measurement,
    shared: Mapping[str, Any],
    feature: str,
    train: Features,
    test: Features,
) -> tuple[Result, np.ndarray]:
    """A row, and for each test image whether it is right."""
    predicted = predictions(job, feature, train, test)
    labels, names = labels_of(job.parts.test, test.positions), job.parts.class_names
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right = (predicted == labels).astype(np.float64)
    low, high = bootstrap_interval(right, seed=job.seed)
    row = Result(
        **shared,
        feature=feature,
        feature_scaling=(
            "standardised by the training part" if job.encoder.standardize else "none"
        ),
        value=float(right.mean()),
        low=low,
        high=high,
        class_names=list(names),
        # A class without test images has no accuracy.
        per_class={
            name: float(row[index] / row.sum())
            for index, (name, row) in enumerate(zip(names, confusion, strict=True))
            if row.sum()
        },
        confusion=confusion.tolist(),
    )
    return row, right


def _average(job: Measurement, rows: list[Result], right: np.ndarray) -> Result:
    """The mean of the scales; an image is drawn or not with all its scales."""
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
    )


def leaks(parts: Parts, train: Features, test: Features) -> dict[str, Any]:
    """Test images whose pixels are those of a training image: how many, and one."""
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
    """Those of `wanted` that the encoder has; all of a control from pixels."""
    if encoder.info is None:
        return list(encoder.features)
    unknown = [name for name in wanted if name not in encoder.features]
    if unknown or not wanted:
        raise UserError(
            f"feature={','.join(wanted)}, expected one or both of "
            f"{','.join(encoder.features)}"
        )
    return list(wanted)


def _describe(encoder: FrozenEncoder) -> dict[str, Any]:
    info = encoder.info or {}
    return {
        "name": encoder.name,
        "kind": encoder.kind,
        "digest": encoder.digest,
        "origin": dict(encoder.origin),
        "normalization": encoder.normalization,
        "architecture": info.get("architecture"),
        "pooling": info.get("pooling"),
    }


def _run() -> dict[str, Any]:
    found = describe_environment()
    kept = ("python", "platform", "versions", "devices", "git_revision", "command")
    return {"time": now(), **{name: found[name] for name in kept}}
