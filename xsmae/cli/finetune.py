"""xsmae finetune --encoder=runs/quickstart --data=eurosat --data.root=DIR

Measures an encoder by training all of it with a classifier, by MAE's recipe, which
--recipe.FIELD=VALUE changes. The control is the same architecture, trained the same way
from random weights.

The trained encoder and its head are kept: xsmae predict labels images with them.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.measure import define_out, measure
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tasks import catalogue


def define_flags(values: flags.FlagValues) -> None:
    """This command's own flags."""
    flags.DEFINE_bool(
        "controls",
        True,
        "Also train the same architecture from random weights, as a control.",
        flag_values=values,
    )
    define_out(values)
    recipe.define_flags(values)


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure the encoder and its control; prints the table."""
    values, config = commandline.parse(
        argv, define_flags, doc=__doc__, recipe_of=lambda values: recipe.finetuning()
    )
    task = catalogue.finetune(recipe=config.recipe, num_workers=values.num_workers)
    if values["missing_bands"].present:
        raise UserError(
            "--missing_bands has no meaning for fine-tuning, which needs an encoder "
            "that reads exactly the images' bands: leave it out"
        )
    commandline.default(values, "scales", ["100"])
    commandline.default(values, "feature", task.features)
    return measure(
        values,
        config,
        task,
        controls=values.controls,
        out=values.out or None,
        should_stop=should_stop,
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
