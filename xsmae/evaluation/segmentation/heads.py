"""The heads of segmentation: name -> how it is trained on an encoder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from xsmae.errors import UserError
from xsmae.evaluation.fitting import fit
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.fitting.recipe import Plan, create_plan_of_steps
from xsmae.evaluation.measure import Measurement
from xsmae.evaluation.scales import Scale
from xsmae.evaluation.segmentation import cache
from xsmae.evaluation.segmentation.crops import CropSampler, crops_of_steps
from xsmae.evaluation.segmentation.dense import (
    Dense,
    last_tokens,
    neighbourhood_statistics,
    normalizer,
)
from xsmae.evaluation.segmentation.scaled import Scaled
from xsmae.evaluation.segmentation.windows import Predict
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.evaluation.tasks.segment import create_learner, create_sampler
from xsmae.evaluation.tasks.segment_frozen import fit_linear, retrieval
from xsmae.train_state import TrainState

HEADS = ("linear", "knn", "upernet")
STATISTICS_SIDE = 9  # pixels, of the neighbourhood of the control
SAVE_EVERY = 1000  # steps of UperNet between two saved states


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained head. state: of its training; None if nothing was trained."""

    predict: Predict
    feature_scaling: str
    state: TrainState | None


@dataclasses.dataclass(frozen=True)
class Head:
    """How an encoder is made to segment.

    name: one of `HEADS`. frozen: False if the encoder is trained too. recipe: see
    `fitting.recipe`.
    """

    name: str
    frozen: bool
    recipe: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The name in tables, such as `segment_upernet_trained`."""
        return f"segment_{self.name}" + "_trained" * (not self.frozen)

    @property
    def feature(self) -> str:
        """What the head reads of an encoder."""
        return "blocks" if self.name == "upernet" else "patches"

    def describe(self) -> dict[str, Any]:
        """The options of a protocol."""
        words = {
            "linear": "batch norm, linear layer; AdamW on features computed once",
            "knn": "the most similar training patches vote",
            "upernet": "UperNet; AdamW on random crops",
        }
        return {
            "head": words[self.name],
            "encoder": "frozen" if self.frozen else "trained",
            **recipes.describe(ml_collections.ConfigDict(self.recipe)),
        }

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise UserError if the encoder cannot have this head or the recipe's crop."""
        if encoder.network is None and self.name != "linear":
            raise UserError(
                f"encoder={encoder.kind} has no network for --head={self.name}: give "
                "--head=linear, or another encoder"
            )
        crop, patch = self.recipe["crop"], encoder.patch_size
        if crop % patch:
            nearest = max(1, round(crop / patch)) * patch
            raise UserError(
                f"recipe.crop={crop} is no multiple of the patches of {encoder.name}, "
                f"which are {patch} px: give --recipe.crop={nearest}"
            )

    def fit(self, job: Measurement, scale: Scale, train: Scaled) -> Fitted:
        """Train it on `train`."""
        if self.name == "upernet":
            return _fit_upernet(job, scale, train, self)
        title, classes = f"{job.encoder.name}: ", len(job.parts.class_names)
        dense = _dense(job.encoder, job)
        features, masks = cache.cached_windows(
            dense,
            train,
            self._windows_folder(job, scale),
            normalize=normalizer(job.encoder),
            crop=self.recipe["crop"],
            batch_size=self.recipe["batch_size"],
            title=f"{title}training images at {scale.percent:g} %",
            say=job.say,
        )
        if self.name == "knn":
            numbers = {n: self.recipe[n] for n in ("k", "temperature", "memory")}
            predict = retrieval(
                dense, features, masks, classes, seed=job.seed, **numbers
            )
            return Fitted(predict, "unit length", None)
        plan = create_plan_of_steps(self.recipe)
        linear = fit_linear(
            dense,
            features,
            masks,
            classes,
            plan,
            recipe=self.recipe,
            seed=job.seed,
            each_step=_each_step(job, title, plan),
        )
        return Fitted(linear, "batch norm", linear.state)

    def _windows_folder(self, job: Measurement, scale: Scale) -> Path:
        """Where the features of the training images are; heads share them."""
        gsd = job.protocol.gsd_policy if job.encoder.reads_gsd else "no"
        name = (
            f"windows-v{cache.VERSION}-{job.parts.train.fingerprint}-"
            f"{scale.percent:g}-{self.recipe['crop']}px-{gsd}gsd"
        )
        return job.cache / job.encoder.digest / name


def create_head(name: str, *, freeze: bool, recipe: recipes.Changes) -> Head:
    """The head `name`; recipe: the fields that differ from the default.

    Raises UserError for an unknown head, or a recipe that does not fit.
    """
    found = recipes.changed(recipe_of(name, freeze), recipe)
    return Head(name, freeze, found.to_dict())


def recipe_of(name: str, frozen: bool) -> ml_collections.ConfigDict:
    """The default recipe of a head. Raises UserError if it needs a frozen encoder."""
    if name not in HEADS:
        raise UserError(f"head={name!r}, expected one of {', '.join(HEADS)}")
    if not frozen and name != "upernet":
        raise UserError(
            f"--head={name} reads a frozen encoder: leave --nofreeze out, or give "
            "--head=upernet"
        )
    if name == "linear":
        return recipes.linear_segmentation()
    if name == "knn":
        return recipes.retrieval_segmentation()
    return recipes.frozen_upernet() if frozen else recipes.trained_upernet()


def _dense(encoder: FrozenEncoder, job: Measurement) -> Dense:
    """Features of patches or, of the control, of pixels; stops between batches."""
    dense = (
        neighbourhood_statistics(STATISTICS_SIDE)
        if encoder.network is None
        else last_tokens(encoder)
    )

    def stoppable(images, gsd):
        if job.should_stop():
            raise KeyboardInterrupt
        return dense(images, gsd)

    return stoppable


def _each_step(
    job: Measurement, title: str, plan: Plan
) -> Callable[[int, jax.Array], None]:
    """Says the loss every few seconds, and stops between steps."""
    said = -math.inf

    def each_step(step: int, loss: jax.Array) -> None:
        nonlocal said
        if job.should_stop():
            raise KeyboardInterrupt
        if time.monotonic() - said > fit.EVERY or step == plan.num_steps:
            said = time.monotonic()
            fit.check_finite(loss, step)
            job.say(f"{title}step {step}/{plan.num_steps}, loss {float(loss):.4f}")

    return each_step


def _fit_upernet(job: Measurement, scale: Scale, train: Scaled, head: Head) -> Fitted:
    plan = create_plan_of_steps(head.recipe)
    learner = create_learner(
        job.encoder,
        len(job.parts.class_names),
        plan,
        recipe=head.recipe,
        frozen=head.frozen,
        seed=job.seed,
    )
    sampler = create_sampler(job.encoder, head.recipe)
    crops = _Crops(train, sampler, plan, head.recipe["batch_size"], job.seed)
    state, _ = fit.train(job, scale, head.feature, learner, crops)

    def predict(images, gsd):
        if job.should_stop():
            raise KeyboardInterrupt
        return learner.predict(state, images, gsd)

    return Fitted(predict, learner.feature_scaling, state)


@dataclasses.dataclass(frozen=True)
class _Crops:
    """The crops of a training: `fit.Batches`."""

    source: Scaled
    sampler: CropSampler
    plan: Plan
    size: int
    seed: int

    @property
    def epochs_per_step(self) -> float:
        return self.size / len(self.source)

    def saved_after(self, step: int) -> bool:
        return step % SAVE_EVERY == 0

    def after(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return crops_of_steps(
            self.source,
            self.sampler,
            batch_size=self.size,
            seed=self.seed,
            start=start,
            num_steps=self.plan.num_steps,
        )
