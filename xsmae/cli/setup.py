"""What the flags of an evaluation name, opened; and the rows that come of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from xsmae.errors import UserError, printable
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.features import RESIZE
from xsmae.evaluation.fitting.fit import CreateLearner, forget, of_trained
from xsmae.evaluation.fitting.recipe import describe
from xsmae.evaluation.measure import (
    INTERVAL,
    Measurement,
    Outcome,
    check_features,
    measure,
)
from xsmae.evaluation.parts import Parts, open_parts
from xsmae.evaluation.rows import Protocol, Result, check_writable
from xsmae.evaluation.subjects import (
    PIXEL_CONTROLS,
    FrozenEncoder,
    open_encoder,
    pixel_control,
    random_encoder,
)
from xsmae.evaluation.tables import terminal_table


@dataclasses.dataclass(frozen=True)
class Setup:
    """An evaluation's flags, opened."""

    encoder: FrozenEncoder
    parts: Parts
    scales: list[scales_of.Scale]
    base_size: int


def open_setup(values: flags.FlagValues, config: ml_collections.ConfigDict) -> Setup:
    """What the flags name, opened and checked against each other."""
    try:
        percents = [float(text) for text in values.scales]
    except ValueError:
        raise UserError(
            f"scales={','.join(values.scales)}, expected percent such as 12.5,25,50,100"
        ) from None
    for name, low in (("batch_size", 1), ("seed", 0), ("base_size", 0)):
        if values[name].value < low:
            raise UserError(f"{name}={values[name].value}, expected {low} or more")
    encoder = open_encoder(
        values.encoder,
        config=config,
        seed=values.seed,
        name=values.name,
        missing_bands=values.missing_bands,
    )
    parts = open_parts(_name(config), config.train.to_dict(), config.test.to_dict())
    base = values.base_size or scales_of.base_size(parts.train)
    scales = scales_of.create_scales(
        percents, base=base, patch_size=encoder.patch_size, gsd_policy=values.gsd
    )
    return Setup(encoder, parts, scales, base)


def measure_all(
    setup: Setup,
    values: flags.FlagValues,
    task: str,
    options: Mapping[str, Any],
    outcomes_of: Callable[[Measurement, scales_of.Scale], Iterable[Outcome]],
    *,
    should_stop: Callable[[], bool],
    random_control: bool = True,
    pixel_controls: bool = True,
    finish: Callable[[Measurement], None] = lambda job: None,
) -> list[Result]:
    """The rows of the encoder and of its controls; prints their table.

    task, options: the protocol's, see `Protocol`. The controls are the encoder's
    architecture with random weights, and what needs no network. `outcomes_of` is
    `Measurement.outcomes`; `finish` is called with every measurement once its rows are
    written.
    """
    check_writable(Path(values.results))
    encoders = [setup.encoder]
    if random_control and setup.encoder.kind == "encoder":
        random = random_encoder(
            setup.encoder.info, seed=values.seed, missing_bands=values.missing_bands
        )
        encoders.append(random)
    if pixel_controls:
        kinds = [kind for kind in PIXEL_CONTROLS if kind != setup.encoder.kind]
        encoders += map(pixel_control, kinds)
    protocol = Protocol(
        task=task,
        metric="accuracy",
        data=setup.parts.describe(),
        base_size=setup.base_size,
        resize=RESIZE,
        gsd_policy=values.gsd,
        options=dict(options),
        interval=INTERVAL,
    )
    rows = []
    for encoder in encoders:
        job = Measurement(
            encoder=encoder,
            parts=setup.parts,
            scales=setup.scales,
            protocol=protocol,
            features=check_features(encoder, values.feature),
            seed=values.seed,
            outcomes=outcomes_of,
            results=Path(values.results),
            cache=Path(values.cache),
            batch_size=values.batch_size,
            should_stop=should_stop,
        )
        rows += measure(job)
        finish(job)
    print(
        printable(terminal_table(rows)), f"rows: {values.results}", sep="\n", flush=True
    )
    return rows


def measure_trained(
    setup: Setup,
    values: flags.FlagValues,
    task: str,
    classifier: str,
    recipe: ml_collections.ConfigDict,
    create_learner: Callable[..., CreateLearner],
    **how: Any,
) -> list[Result]:
    """`measure_all` of classifiers that are trained on crops by `recipe`.

    classifier: what it is, in words. create_learner: `CreateLearner`, which is given
    the recipe besides. The states of the trainings are removed once the rows stand.
    """
    fields = recipe.to_dict()
    outcomes = functools.partial(
        of_trained,
        create_learner=functools.partial(create_learner, recipe=fields),
        recipe=fields,
        num_workers=values.num_workers,
    )
    options = {"classifier": classifier, **describe(recipe)}
    return measure_all(setup, values, task, options, outcomes, finish=forget, **how)


def _name(config: ml_collections.ConfigDict) -> str:
    """What the data is called: TFDS's name, or that of its folder or table."""
    for data in (config.data, config.train):
        if data.get("name"):
            return data.name
        place = data.get("root") or data.get("csv_path")
        if place:
            return Path(place).absolute().stem
    return config.data.source
