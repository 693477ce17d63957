"""Fine-tuning on labelled images: `python -m xsmae.finetune --encoder=RUN ...`.

The whole encoder is trained with a classifier on it by MAE's recipe, each number of
which is set by --recipe.FIELD=VALUE. The control is the same architecture trained by
the same recipe from random weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from absl import flags

from xsmae.data.images import BANDS
from xsmae.errors import UserError
from xsmae.evaluation import commandline, recipe
from xsmae.evaluation.features import RESIZES
from xsmae.evaluation.finetune import create_learner
from xsmae.evaluation.frozen import PIXEL_CONTROLS
from xsmae.evaluation.measure import INTERVAL
from xsmae.evaluation.protocol import Protocol, Result
from xsmae.evaluation.training import forget, of_trained


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this binary alone."""
    flags.DEFINE_bool(
        "controls",
        True,
        "Train the same architecture from random weights too.",
        flag_values=values,
    )
    recipe.define_flags(values)


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure what the flags name, and its control; prints the table."""
    values, config = commandline.parse(
        argv, define_flags, lambda values: recipe.finetuning()
    )
    recipe.check(config.recipe)
    if values.encoder in PIXEL_CONTROLS:
        raise UserError(
            f"encoder={values.encoder} has no weights to fine-tune: give an exported "
            "encoder, a workdir, RUN/checkpoints/STEP or random:SIZE"
        )
    commandline.default(values, "scales", ["100"])
    commandline.default(values, "feature", ["mean"])
    setup = commandline.open_setup(values, config)
    bands = tuple(setup.encoder.info["bands"])
    if bands != BANDS:
        raise UserError(
            f"{setup.encoder.name} reads the bands {', '.join(bands)}, expected those "
            f"of the images to fine-tune it: {', '.join(BANDS)} in this order"
        )
    options = recipe.describe(config.recipe)
    protocol = Protocol(
        task="finetune",
        metric="accuracy",
        data=setup.parts.describe(),
        base_size=setup.base_size,
        resize=RESIZES["area"],
        gsd_policy=values.gsd,
        options={"classifier": "the whole encoder and a linear layer", **options},
        interval=INTERVAL,
    )
    fields = config.recipe.to_dict()
    outcomes = functools.partial(
        of_trained,
        create_learner=functools.partial(create_learner, recipe=fields),
        recipe=fields,
        num_workers=values.num_workers,
    )
    return commandline.measure_all(
        setup,
        values,
        protocol,
        outcomes,
        should_stop=should_stop,
        random_control=values.controls,
        pixel_controls=False,
        finish=forget,
    )


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    return commandline.run(evaluate, argv, doc=__doc__, define=define_flags)


if __name__ == "__main__":
    sys.exit(main())
