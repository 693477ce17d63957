"""Trains classifiers on crops, with checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from xsmae.checkpoints import Checkpoints
from xsmae.data.pipeline import make_batches
from xsmae.data.records import Subset
from xsmae.errors import UserError
from xsmae.evaluation.cache import Features, cached_features
from xsmae.evaluation.features import encode_batches
from xsmae.evaluation.fitting.recipe import Plan, create_crops, create_plan
from xsmae.evaluation.measure import Measurement, Outcome
from xsmae.evaluation.scales import Scale
from xsmae.evaluation.subjects import pixel_control
from xsmae.process.lock import FolderLock
from xsmae.process.progress import Progress
from xsmae.train_state import TrainState
from xsmae.weights.classifier import TrainedClassifier

VERSION = 1  # raise it when the same training gives different numbers
EVERY = 5.0  # seconds between progress lines
ANY_PIXEL = 1e-9  # crops of rasters without any valid pixel are drawn again


@dataclasses.dataclass(frozen=True)
class Learner:
    """A classifier that can be trained.

    state: the initial state. step(state, images, gsd, labels) -> (state, loss).
    predict(state, images, gsd) -> scores [n, classes]. images: [n, size, size, bands],
    see `features.Encode`; gsd: [n, 2] metres per pixel; labels: [n]. feature_scaling:
    see `Result`. trained(state) -> the classifier to keep; None if there is none.
    """

    state: TrainState
    step: Callable[..., tuple[TrainState, jax.Array]]
    predict: Callable[[TrainState, np.ndarray, np.ndarray], jax.Array]
    feature_scaling: str
    trained: Callable[[TrainState], TrainedClassifier] | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """The test images that were classified, and their scores."""

    positions: np.ndarray
    pixels: np.ndarray
    gsd: np.ndarray
    scores: np.ndarray


class Batches(Protocol):
    """The batches of a training.

    size: images per step. epochs_per_step: how much of an epoch a step is.
    """

    @property
    def plan(self) -> Plan: ...

    @property
    def size(self) -> int: ...

    @property
    def epochs_per_step(self) -> float: ...

    def saved_after(self, step: int) -> bool:
        """True if the state is saved after `step`, besides the last one."""

    def after(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Images, GSDs and labels of the steps after `start`."""


# (measurement, feature, plan of the training) -> learner.
CreateLearner = Callable[[Measurement, str, Plan], Learner]


def of_trained(
    job: Measurement,
    scale: Scale,
    *,
    create_learner: CreateLearner,
    recipe: Mapping[str, Any],
    num_workers: int = 0,
) -> Iterator[Outcome]:
    """Train one classifier per feature, by `recipe`, on crops of the training images.

    The crops of a step depend only on the seed and the step. The last step's state
    counts; no step is selected. The state is saved after each epoch, and before
    KeyboardInterrupt is raised once `job.should_stop()` is true. `forget` removes it.
    Raises UserError if the loss is not finite.
    """
    used = _usable(job, scale)
    for feature in job.features:
        source = Subset(job.parts.train, used.positions)
        plan = create_plan(recipe, num_images=len(source))
        learner = create_learner(job, feature, plan)
        begin = time.monotonic()
        batches = _Batches(job, scale, source, plan, recipe, num_workers)
        state, steps = train(job, scale, feature, learner, batches)
        seconds = time.monotonic() - begin
        test = _classify(job, scale, learner, state)
        yield Outcome(
            feature=feature,
            feature_scaling=learner.feature_scaling,
            predicted=test.scores.argmax(axis=1),
            train=used,
            test=test,
            gsd_told=float(np.median(test.gsd)) if job.encoder.reads_gsd else None,
            seconds=seconds if steps else None,
            images_per_second=steps * recipe["batch_size"] / seconds if steps else None,
            trained=learner.trained and functools.partial(learner.trained, state),
        )


def forget(job: Measurement) -> None:
    """Remove the saved states of `job`'s trainings, once its rows are written."""
    for scale in job.scales:
        for feature in job.features:
            shutil.rmtree(state_folder(job, scale, feature), ignore_errors=True)


def state_folder(job: Measurement, scale: Scale, feature: str) -> Path:
    """The folder of a training's state; its name has everything that decides it."""
    name = (
        f"training-v{VERSION}-{job.protocol.key}-{scale.percent:g}-{scale.size}px-"
        f"{feature}-seed{job.seed}"
    )
    return job.cache / job.encoder.digest / name


def _usable(job: Measurement, scale: Scale) -> Features:
    """The readable training images and their digests, cached like features."""
    return cached_features(
        pixel_control("statistics"),
        job.parts.train,
        scale,
        cache=job.cache,
        batch_size=job.batch_size,
        title="training images read",
        should_stop=job.should_stop,
        say=job.say,
    )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The crops of a training, from any step onwards."""

    job: Measurement
    scale: Scale
    source: Subset
    plan: Plan
    recipe: Mapping[str, Any]
    num_workers: int

    @property
    def size(self) -> int:
        return self.recipe["batch_size"]

    @property
    def epochs_per_step(self) -> float:
        return self.size / len(self.source)

    def saved_after(self, step: int) -> bool:
        """True after the last step of each epoch."""
        epoch = step * self.epochs_per_step
        return math.floor(epoch) > math.floor(epoch - self.epochs_per_step)

    def after(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Images, GSDs and labels of the steps after `start`."""
        if start >= self.plan.num_steps:
            return
        crops = make_batches(
            self.source,
            create_crops(self.recipe, size=self.scale.size),
            seed=self.job.seed,
            batch_size=self.size,
            start_step=start,
            num_steps=self.plan.num_steps,
            max_rejected_fraction=0.0,
            min_valid=ANY_PIXEL,
            num_workers=self.num_workers,
        )
        for batch in crops:
            if (batch["index"] < 0).any():
                lost = self.source.id(batch["requested"][batch["index"] < 0][0])
                empty = ", or its crops have no pixel with a value" * ("valid" in batch)
                raise UserError(
                    f"{lost} could be read before the training but not now{empty}: "
                    "restore it, then run the same command to resume from the last "
                    "epoch"
                )
            images = batch["image"][:, 0]
            if "valid" in batch:
                valid = batch["valid"][:, 0, ..., None]
                images = np.where(valid, images, np.float32(np.nan))
            gsd = batch["gsd"][:, 0] * np.float32(self.scale.gsd_factor)
            yield images, gsd, self.source.labels[batch["index"]]


def train(
    job: Measurement, scale: Scale, feature: str, learner: Learner, batches: Batches
) -> tuple[TrainState, int]:
    """The state after the last step, and how many steps ran now."""
    title = f"{job.encoder.name}, {scale.percent:g} % ({scale.size} px), {feature}"
    folder = state_folder(job, scale, feature)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {job.cache}: {error.strerror}; free space or "
            "give another --cache"
        ) from None
    with FolderLock(folder):
        return _train_in(folder, job, title, learner, batches)


def _train_in(
    folder: Path, job: Measurement, title: str, learner: Learner, batches: Batches
) -> tuple[TrainState, int]:
    """`train` in a folder that this process has locked."""
    checkpoints = Checkpoints(folder, keep=1, say=job.say)
    num_steps = batches.plan.num_steps
    state, start = _restore(job, checkpoints, learner)
    if start:
        job.say(f"{title}: resuming from step {start}/{num_steps}")
    progress = Progress(start_step=start, num_steps=num_steps, batch_size=batches.size)
    said, previous = -math.inf, None
    try:
        for step, batch in enumerate(batches.after(start), start + 1):
            state, loss = learner.step(state, *batch)
            # Check the previous step's loss, so that the device need not wait.
            check_finite(previous, step - 1)
            previous = loss
            if step == start + 1:
                jax.block_until_ready(loss)
                progress.restart(step)  # the first step compiles
            epoch = step * batches.epochs_per_step
            whole = batches.saved_after(step)
            stopping = job.should_stop()
            if whole or stopping or step == num_steps:
                check_finite(loss, step)
                checkpoints.save(step, state, fingerprint=job.parts.train.fingerprint)
            if time.monotonic() - said > EVERY or stopping or step == num_steps:
                first = step == start + 1
                rate = math.nan if first else progress.images_per_second(step)
                told = {"loss": loss, "epoch": epoch, "images_per_second": rate}
                job.say(f"{title}: {progress.line(step, told)}")
                said = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
    finally:
        checkpoints.close()
    return state, num_steps - start


def _restore(
    job: Measurement, checkpoints: Checkpoints, learner: Learner
) -> tuple[TrainState, int]:
    """The saved state and its step, or the initial state and 0."""
    fingerprint, folder = job.parts.train.fingerprint, checkpoints.directory
    try:
        found = checkpoints.restore_newest(learner.state, fingerprint=fingerprint)
    except UserError as error:  # a training can always start again
        job.say(f"{folder} is damaged ({error}): this training starts again")
        for step in checkpoints.steps():
            shutil.rmtree(folder / str(step))
        found = None
    start, state = found or (0, learner.state)
    return state, start


def check_finite(loss: jax.Array | None, step: int) -> None:
    """Raise UserError if there is a loss and it is not finite."""
    if loss is not None and not np.isfinite(loss):
        raise UserError(
            f"the loss is {float(loss)} at step {step}: lower --recipe.learning_rate"
        )


def _classify(
    job: Measurement, scale: Scale, learner: Learner, state: TrainState
) -> Seen:
    """The scores of the test images: whole images, resized as for frozen features."""
    found = []
    batches = encode_batches(
        lambda images, gsd: {"scores": learner.predict(state, images, gsd)},
        job.parts.test,
        np.arange(len(job.parts.test)),
        size=scale.size,
        batch_size=job.batch_size,
        gsd_factor=scale.gsd_factor,
        should_stop=job.should_stop,
    )
    for batch, encoded in batches:
        found.append((batch.index, batch.pixels, batch.gsd, encoded["scores"]))
    if not found:
        raise UserError(f"none of the images of {job.parts.test!r} can be used")
    return Seen(*map(np.concatenate, zip(*found, strict=True)))
