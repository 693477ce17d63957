"""The tasks that measure an encoder: name -> a function that creates the task."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from xsmae.errors import UserError
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.fitting.fit import CreateLearner, forget, of_trained
from xsmae.evaluation.measure import (
    Measurement,
    Outcome,
    Predict,
    measure,
    of_frozen_features,
)
from xsmae.evaluation.parts import Parts
from xsmae.evaluation.rows import Result
from xsmae.evaluation.scales import SCALES, USUAL, Scale, Sizing, create_several
from xsmae.evaluation.subjects import PIXEL_CONTROLS, FrozenEncoder
from xsmae.evaluation.tasks import finetune as finetuning
from xsmae.evaluation.tasks import published_probe, satdino
from xsmae.evaluation.tasks.cross_scale import measure_across
from xsmae.evaluation.tasks.knn import knn_predict
from xsmae.evaluation.tasks.probe import PENALTIES, VALIDATION, sweep_fit
from xsmae.evaluation.variants import at_block, check_block, standardized
from xsmae.weights.classifier import TrainedClassifier


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to measure an encoder, with its options.

    name, options: see `rows.Protocol`. outcomes: see `Measurement.outcomes`. features:
    measured by default. pixel_controls: True if the task also works for controls
    without a network. check_encoder, check_parts: raise UserError for an encoder or
    data that the task cannot measure. finish: called with a measurement once its rows
    are written. sizing: how it chooses the sizes of images. measure: makes the rows of
    a measurement. adapt(parts, should_stop): gives a function from an encoder or
    control to what the task measures. fixed_features: True if no other ones may be
    measured.
    """

    name: str
    options: Mapping[str, Any]
    outcomes: Callable[[Measurement, Scale], Iterable[Outcome]]
    features: tuple[str, ...] = FEATURES
    pixel_controls: bool = True
    check_encoder: Callable[[FrozenEncoder], None] = lambda encoder: None
    check_parts: Callable[[Parts], None] = lambda parts: None
    finish: Callable[[Measurement], None] = lambda job: None
    sizing: Sizing = USUAL
    measure: Callable[[Measurement], list[Result]] = measure
    adapt: Callable[
        [Parts, Callable[[], bool]], Callable[[FrozenEncoder], FrozenEncoder]
    ] = lambda parts, should_stop: lambda encoder: encoder
    fixed_features: bool = False


def knn(
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardize: bool = False,
    block: int | None = None,
) -> Task:
    """The k most similar training images vote with exp(cosine / temperature).

    standardize: True gives every dimension mean 0 and standard deviation 1 over the
    training images. block: the features are of the tokens of this block, counted from
    1, without the final norm; None: of the last block, after the final norm.
    """
    return _knn("knn", k, temperature, standardize, block)


def knn_cross_scale(
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardize: bool = False,
    block: int | None = None,
) -> Task:
    """`knn` with the training images at one scale and the test images at another.

    All pairs of the scales are measured, see `cross_scale.measure_across`.
    `standardize` uses the training images at their own scale.
    """

    def measure(job: Measurement) -> list[Result]:
        return measure_across(job, predict=_nearest(job, k, temperature))

    return dataclasses.replace(
        _knn("knn_cross_scale", k, temperature, standardize, block),
        sizing=Sizing(percents=SCALES, create_scales=create_several),
        measure=measure,
    )


def knn_satdino() -> Task:
    """`knn` by SatDINO's protocol, see `tasks/satdino.py`."""
    task = _knn("knn_satdino", satdino.K, satdino.TEMPERATURE, False, None)

    def check(parts: Parts) -> None:
        satdino.check_8_bit(parts)
        task.check_parts(parts)

    options = {**task.options, "normalization": "mean and std of the training images"}
    return dataclasses.replace(
        task,
        options=options,
        features=("cls",),
        fixed_features=True,
        check_parts=check,
        sizing=satdino.SIZING,
        adapt=satdino.normalize_by_data,
    )


def _nearest(job: Measurement, k: int, temperature: float) -> Predict:
    return functools.partial(
        knn_predict, k=k, temperature=temperature, should_stop=job.should_stop
    )


def _knn(
    name: str, k: int, temperature: float, standardize: bool, block: int | None
) -> Task:
    if k < 1 or not temperature > 0:
        raise UserError(
            f"k={k}, temperature={temperature}, expected k of 1 or more and a "
            "temperature above 0"
        )

    def check(parts: Parts) -> None:
        images = len(parts.train)
        if k > images:
            raise UserError(
                f"k={k} is more than the {images} training images: give --k={images} "
                "or less"
            )

    def outcomes(job: Measurement, scale: Scale) -> Iterable[Outcome]:
        predict = _nearest(job, k, temperature)
        return of_frozen_features(job, scale, predict=predict)

    def check_encoder(encoder: FrozenEncoder) -> None:
        if block is not None:
            check_block(encoder, block)

    def adapt(encoder: FrozenEncoder) -> FrozenEncoder:
        encoder = encoder if block is None else at_block(encoder, block)
        return standardized(encoder) if standardize else encoder

    # Only what differs from the usual protocol, whose rows have no such options.
    options = {"k": k, "temperature": temperature}
    options |= {"standardize": True} if standardize else {}
    options |= {} if block is None else {"block": block}
    return Task(
        name,
        options,
        outcomes,
        check_parts=check,
        check_encoder=check_encoder,
        adapt=lambda parts, should_stop: adapt,
    )


def linear_probe(
    *, penalties: Sequence[float] = PENALTIES, validation: float = VALIDATION
) -> Task:
    """Logistic regression. Its L2 penalty is chosen on held-out training images."""
    try:
        ordered = sorted({float(penalty) for penalty in penalties})
    except (TypeError, ValueError):
        ordered = []
    if not ordered or not ordered[0] >= 0 or not 0 < validation < 1:
        raise UserError(
            f"penalties={','.join(map(str, penalties))}, validation={validation}, "
            "expected penalties of 0 or more and a validation fraction between 0 and 1"
        )

    def outcomes(job: Measurement, scale: Scale) -> Iterable[Outcome]:
        fitted = None

        def predict(bank, labels, queries, *, num_classes):
            nonlocal fitted
            fitted = sweep_fit(
                bank,
                labels,
                num_classes=num_classes,
                penalties=ordered,
                validation=validation,
                seed=job.seed,
                should_stop=job.should_stop,
                say=lambda line: job.say(f"{job.encoder.name}: {line}"),
            )
            return fitted.predict(queries)

        for outcome in of_frozen_features(job, scale, predict=predict):
            trained = functools.partial(TrainedClassifier.logistic, fitted, job.encoder)
            yield dataclasses.replace(
                outcome, trained=trained if job.encoder.network else None
            )

    options = {
        "classifier": "logistic regression, L-BFGS, standardised features",
        "penalties": ordered,
        "validation": validation,
    }
    return Task("linear_probe", options, outcomes)


def linear_probe_published(
    *, recipe: recipes.Changes = None, num_workers: int = 0
) -> Task:
    """The papers' probe: batch norm and a linear layer, trained by LARS on crops.

    recipe: fields that replace those of `recipe.published_probe`.
    """
    return _trained(
        "linear_probe_published",
        "batch norm, linear; LARS on random crops",
        recipes.changed(recipes.published_probe(), recipe),
        published_probe.create_learner,
        num_workers,
        features=("cls",),
    )


def finetune(*, recipe: recipes.Changes = None, num_workers: int = 0) -> Task:
    """The whole encoder and a linear layer, trained by MAE's recipe.

    recipe: fields that replace those of `recipe.finetuning`.
    """
    return _trained(
        "finetune",
        "the whole encoder and a linear layer",
        recipes.changed(recipes.finetuning(), recipe),
        finetuning.create_learner,
        num_workers,
        features=("mean",),
        pixel_controls=False,
        check_encoder=_check_trainable,
    )


TASKS: Mapping[str, Callable[..., Task]] = {
    "knn": knn,
    "knn_cross_scale": knn_cross_scale,
    "knn_satdino": knn_satdino,
    "linear_probe": linear_probe,
    "linear_probe_published": linear_probe_published,
    "finetune": finetune,
}


def create_task(name: str, **options: Any) -> Task:
    """The task `name`, with the options of its function in this file.

    Raises UserError for an unknown name or option.
    """
    if name not in TASKS:
        raise UserError(f"task={name!r}, expected one of {', '.join(TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UserError(
            f"task={name} has no option {', '.join(unknown)}, expected some of "
            f"{', '.join(known)}"
        )
    return TASKS[name](**options)


def _trained(
    name: str,
    classifier: str,
    recipe: ml_collections.ConfigDict,
    create_learner: Callable[..., CreateLearner],
    num_workers: int,
    **how: Any,
) -> Task:
    """A task that trains a classifier on crops by `recipe`.

    classifier: its description. create_learner: a `CreateLearner` that also takes the
    recipe. The states of the trainings are removed once the rows are written.
    """
    if num_workers < 0:
        raise UserError(f"num_workers={num_workers}, expected 0 or more")
    fields = recipe.to_dict()
    outcomes = functools.partial(
        of_trained,
        create_learner=functools.partial(create_learner, recipe=fields),
        recipe=fields,
        num_workers=num_workers,
    )
    options = {"classifier": classifier, **recipes.describe(recipe)}
    return Task(name, options, outcomes, finish=forget, **how)


def _check_trainable(encoder: FrozenEncoder) -> None:
    """Raise UserError if the encoder has no weights or reads other bands."""
    if encoder.kind in PIXEL_CONTROLS:
        raise UserError(
            f"encoder={encoder.kind} has no weights to fine-tune: give an exported "
            "encoder, a workdir, RUN/checkpoints/STEP or random:SIZE"
        )
    bands, kind = tuple(encoder.info["bands"]), encoder.reading.kind
    in_order = bands == kind.bands or kind.dtype != "uint8"
    if encoder.filled or not in_order:
        raise UserError(
            f"{encoder.name} reads the bands {', '.join(bands)}, expected "
            f"{', '.join(kind.bands)} in this order: give an encoder that reads the "
            "images' bands to fine-tune it"
        )
