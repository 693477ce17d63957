"""Measures how well a head on an encoder segments images; returns result rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from xsmae.errors import UserError
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.evaluate import Subject
from xsmae.evaluation.fitting.fit import state_folder
from xsmae.evaluation.intervals import LEVEL, RESAMPLES
from xsmae.evaluation.kept import HEAD, describe_training, writing_to
from xsmae.evaluation.measure import (
    Measurement,
    describe_run,
    describe_subject,
    leaks,
)
from xsmae.evaluation.parts import Data, name_of
from xsmae.evaluation.rows import (
    Protocol,
    Result,
    append,
    check_writable,
    column,
    identity,
    read,
)
from xsmae.evaluation.segmentation.dense import normalizer
from xsmae.evaluation.segmentation.heads import Fitted, Head
from xsmae.evaluation.segmentation.kept import Examples, write_kept
from xsmae.evaluation.segmentation.parts import MaskParts, Pixels, open_mask_parts
from xsmae.evaluation.segmentation.scaled import RESIZE, Scaled
from xsmae.evaluation.segmentation.scores import bootstrap, confusion, scores
from xsmae.evaluation.segmentation.subjects import controls_of, subject_of_masks
from xsmae.evaluation.tasks.segment import guesses
from xsmae.weights.head import save_head

# `Scores` field -> its name in `Result.metrics`.
OTHERS = {
    "accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "weighted_iou": "frequency-weighted IoU",
}


def evaluate_segmentation(
    encoder: Subject,
    train: Data,
    test: Data,
    *,
    head: Head,
    results: Path | None,
    out: Path | None,
    cache: Path,
    scales: Sequence[float] = (100.0,),
    gsd: str = "true",
    controls: bool = True,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
    missing_bands: str = "refuse",
    config: ml_collections.ConfigDict | None = None,
    draw: Callable[[Path, MaskParts, str], None] = lambda folder, parts, title: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[Result]:
    """Train `head` on the training part and measure it on the test part.

    The controls are measured alongside: the architecture with random weights and, for
    the linear head, statistics of each pixel's neighbourhood. One row per encoder and
    scale is added to `results`, if given, as soon as it is known; rows already there
    are not measured again. out: the folder that gets a folder per row, see `kept`; that
    of the encoder itself gets the trained head too. None keeps neither. scales: percent
    of the images' own size.
    draw(folder, parts, title) is called once a row's folder is written. The other
    arguments are those of `evaluate`.

    Raises:
      UserError: arguments or data that do not fit, before anything is trained.
    """
    if seed < 0:
        raise UserError(f"seed={seed}, expected 0 or more")
    if results is not None:
        check_writable(results)
    parts = open_mask_parts(
        data_name or name_of(train), train, test, should_stop=should_stop, say=say
    )
    never = parts.never_trained()
    if never:
        say(f"classes without a training pixel: {', '.join(never)}")
    subject = subject_of_masks(
        encoder,
        parts,
        config=config,
        seed=seed,
        name=name,
        missing_bands=missing_bands,
    )
    head.check(subject)
    sizes = _sizes(scales, head, gsd)
    subjects = [subject]
    if controls:
        subjects += controls_of(subject, parts, head, seed, missing_bands)
    protocol = _protocol(parts, head, gsd)
    rows = []
    for subject in subjects:
        job = Measurement(
            encoder=subject,
            parts=parts,
            scales=sizes,
            protocol=protocol,
            features=[head.feature if subject.network else subject.kind],
            seed=seed,
            outcomes=lambda job, scale: (),  # `_measure` makes the rows itself
            results=results,
            cache=cache,
            should_stop=should_stop,
            say=say,
        )
        rows += _measure(job, head, out, draw, keeps_head=subject is subjects[0])
    return rows


def _measure(
    job: Measurement,
    head: Head,
    out: Path | None,
    draw: Callable[[Path, MaskParts, str], None],
    *,
    keeps_head: bool,
) -> list[Result]:
    """The row of each scale, measured unless it is in the file."""
    rows = []
    known = {row.identity: row for row in read(job.results)} if job.results else {}
    encoder, (feature,) = describe_subject(job), job.features
    for scale in job.scales:
        place = column(scale.percent, scale.size)
        key = identity(job.protocol, encoder, feature, place, job.seed)
        title = f"{job.encoder.name}, {scale.percent:g} %"
        if key in known:
            job.say(f"{title}: {job.results} already has its row for this protocol")
            rows.append(known[key])
            continue
        folder = None if out is None else out / key
        row = _row(job, head, scale, folder, keeps_head=keeps_head)
        if folder is not None:
            value = f"mIoU {100 * row.value:.1f} %"
            draw(folder, job.parts, f"{title}, {head.task}, {value}")
        if job.results:
            append(job.results, row)
        shutil.rmtree(state_folder(job, scale, feature), ignore_errors=True)
        low, high = 100 * row.low, 100 * row.high
        job.say(f"{title}: mIoU {100 * row.value:.1f} [{low:.1f}, {high:.1f}]")
        rows.append(row)
    return rows


def _row(
    job: Measurement,
    head: Head,
    scale: scales_of.Scale,
    folder: Path | None,
    *,
    keeps_head: bool,
) -> Result:
    """Trains, predicts, counts, and writes into `folder` what is kept of the row."""
    begin, parts = time.monotonic(), job.parts
    policy, names = job.protocol.gsd_policy, parts.class_names
    train = Scaled(parts.train, scale.percent, gsd=policy)
    fitted = head.fit(job, scale, train)
    test = Scaled(parts.test, scale.percent, gsd=policy, whole_masks=True)
    found = np.zeros((len(test), len(names), len(names)), np.int64)
    examples = Examples(parts.test)
    predicted = guesses(
        fitted.predict, test, normalize=normalizer(job.encoder), recipe=head.recipe
    )
    for guess in predicted:
        found[guess.image] += confusion(guess.mask, guess.predicted, len(names))
        examples.add(guess)
    seconds = time.monotonic() - begin
    if folder is not None:
        write_kept(folder, parts, found, examples)
        if keeps_head and job.encoder.network and fitted.state:
            _save_head(folder / HEAD, job, head, fitted, scale)
    value = scores(found)
    interval = bootstrap(found, seed=job.seed, scenes=parts.scenes)
    seen = {part: Pixels.of(survey) for part, survey in parts.surveys.items()}
    return Result(
        protocol=job.protocol,
        encoder=describe_subject(job),
        feature=job.features[0],
        feature_scaling=fitted.feature_scaling,
        scale=scale.percent,
        size=scale.size,
        gsd_told=_gsd_told(job, scale) if job.encoder.reads_gsd else None,
        seed=job.seed,
        value=float(value.miou),
        low=float(interval.low.miou),
        high=float(interval.high.miou),
        class_names=list(names),
        # A class without a true or a predicted pixel has no IoU, so it is left out.
        per_class={
            name: float(iou)
            for name, iou in zip(names, value.iou, strict=True)
            if not np.isnan(iou)
        },
        confusion=found.sum(axis=0).tolist(),
        num_train=len(parts.train),
        num_test=len(parts.test),
        unusable={"train": 0, "test": 0},
        leaks=leaks(parts, seen["train"], seen["test"]),
        seconds=seconds,
        images_per_second=None,
        run=describe_run(),
        metrics={
            text: [
                float(getattr(s, field)) for s in (value, interval.low, interval.high)
            ]
            for field, text in OTHERS.items()
        },
        files=None if folder is None else str(folder),
    )


def _save_head(
    folder: Path, job: Measurement, head: Head, fitted: Fitted, scale: scales_of.Scale
) -> None:
    with writing_to(folder):
        save_head(
            folder,
            job.encoder,
            fitted.state,
            kind=head.name,
            classes=job.parts.class_names,
            colours=job.parts.train.colours,
            recipe=head.recipe,
            training=describe_training(job.encoder, job.protocol, scale, job.seed),
        )


def _gsd_told(job: Measurement, scale: scales_of.Scale) -> float:
    """The median over the test images, after resizing unless the GSD is fixed."""
    gsd = [image.gsd for image in job.parts.surveys["test"].images]
    fixed = job.protocol.gsd_policy == "fixed"
    return float(np.median(gsd) * (1 if fixed else 100 / scale.percent))


def _sizes(percents: Sequence[float], head: Head, gsd: str) -> list[scales_of.Scale]:
    """The scales; their size is that of the windows, whatever the percentage is."""
    if gsd not in scales_of.GSD_POLICIES:
        raise UserError(
            f"gsd={gsd}, expected one of {', '.join(scales_of.GSD_POLICIES)}"
        )
    wrong = [p for p in percents if not 0 < p <= 1000]
    if wrong or not percents or len(set(percents)) < len(percents):
        raise UserError(
            f"scales={','.join(f'{p:g}' for p in percents)}, expected different "
            "percentages above 0 and up to 1000, such as 50,100"
        )
    return [scales_of.Scale(p, head.recipe["crop"], 1.0) for p in sorted(percents)]


def _protocol(parts: MaskParts, head: Head, gsd: str) -> Protocol:
    recipe, scenes = head.recipe, parts.scenes
    over = f"{len(set(scenes))} test scenes" if scenes else "test images"
    return Protocol(
        task=head.task,
        metric="mIoU",
        data=parts.describe(),
        base_size=0,
        resize=RESIZE,
        gsd_policy=gsd,
        options={
            **head.describe(),
            "mean over": "classes with a true or a predicted test pixel",
            "ignored": "class 255",
            "test masks": "full size; predictions take the nearest pixel",
        },
        interval={
            "method": f"percentile bootstrap over {over}",
            "level": LEVEL,
            "resamples": RESAMPLES,
        },
        crop=f"windows of {recipe['crop']} px that share {recipe['overlap']} px",
    )
