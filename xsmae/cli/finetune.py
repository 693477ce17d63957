"""xsmae finetune --encoder=runs/quickstart --data=eurosat --data.root=DIR

Measures an encoder by training all of it with a classifier, by MAE's recipe, whose
numbers --recipe.FIELD=VALUE sets. The control is the same architecture trained in the
same way from random weights.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.setup import measure_trained, open_setup
from xsmae.data.images import BANDS
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.rows import Result
from xsmae.evaluation.subjects import PIXEL_CONTROLS
from xsmae.evaluation.tasks.finetune import create_learner


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command alone."""
    flags.DEFINE_bool(
        "controls",
        True,
        "Train the same architecture from random weights too, as a control.",
        flag_values=values,
    )
    recipe.define_flags(values)


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure what the flags name, and its control; prints the table."""
    values, config = commandline.parse(
        argv, define_flags, doc=__doc__, recipe_of=lambda values: recipe.finetuning()
    )
    recipe.check(config.recipe)
    if values.encoder in PIXEL_CONTROLS:
        raise UserError(
            f"encoder={values.encoder} has no weights to fine-tune: give an exported "
            "encoder, a workdir, RUN/checkpoints/STEP or random:SIZE"
        )
    if values["missing_bands"].present:
        raise UserError(
            "--missing_bands has no meaning for fine-tuning, which needs an encoder of "
            "the images' bands: leave it out"
        )
    commandline.default(values, "scales", ["100"])
    commandline.default(values, "feature", ["mean"])
    setup = open_setup(values, config)
    bands = tuple(setup.encoder.info["bands"])
    if bands != BANDS:
        raise UserError(
            f"{setup.encoder.name} reads the bands {', '.join(bands)}, expected those "
            f"of the images to fine-tune it: {', '.join(BANDS)} in this order"
        )
    return measure_trained(
        setup,
        values,
        "finetune",
        "the whole encoder and a linear layer",
        config.recipe,
        create_learner,
        should_stop=should_stop,
        random_control=values.controls,
        pixel_controls=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae finetune`; returns the exit status."""
    return commandline.run(
        evaluate,
        argv,
        doc=__doc__,
        define=define_flags,
        recipe={"The recipe": recipe.finetuning()},
    )
