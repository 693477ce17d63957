"""xsmae probe --encoder=runs/quickstart --data=eurosat --data.root=DIR

Measures a frozen encoder by a linear classifier: --protocol=sweep fits logistic
regressions to features; --protocol=published trains batch norm and a linear layer on
random crops, as in the papers. Image statistics, a thumbnail and the same architecture
with random weights are measured alongside, as controls.

The trained head of each result is kept: xsmae predict labels images with it.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections
from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.measure import define_out, measure
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tasks import catalogue
from xsmae.evaluation.tasks.probe import PENALTIES, VALIDATION

# The flags that only one protocol uses.
FLAGS = {"sweep": ("penalties", "validation"), "published": ("num_workers",)}


def define_flags(values: flags.FlagValues) -> None:
    """This command's own flags."""
    flags.DEFINE_enum(
        "protocol",
        "sweep",
        tuple(FLAGS),
        "sweep: logistic regression; its penalty is chosen on training images. "
        "published: as in the papers, trained by LARS on random crops.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "penalties",
        [f"{penalty:g}" for penalty in PENALTIES],
        "The L2 penalties that the sweep chooses from.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "validation",
        VALIDATION,
        "The fraction of each class's training images held out to choose the penalty.",
        flag_values=values,
    )
    define_out(values)
    recipe.define_flags(values)


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure the encoder and its controls; prints the table."""
    values, config = commandline.parse(
        argv, define_flags, doc=__doc__, recipe_of=_recipe_of
    )
    for protocol, names in FLAGS.items():
        given = [name for name in names if values[name].present]
        if given and values.protocol != protocol:
            raise UserError(
                f"--{given[0]} has no meaning for protocol={values.protocol}: leave it "
                f"out, or give --protocol={protocol}"
            )
    if values.protocol == "published":
        task = catalogue.linear_probe_published(
            recipe=config.recipe, num_workers=values.num_workers
        )
        commandline.default(values, "scales", ["100"])
        commandline.default(values, "feature", task.features)
    else:
        task = catalogue.linear_probe(
            penalties=values.penalties, validation=values.validation
        )
    out = values.out or None
    return measure(values, config, task, out=out, should_stop=should_stop)


def _recipe_of(values: flags.FlagValues) -> ml_collections.ConfigDict | None:
    return recipe.published_probe() if values.protocol == "published" else None


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae probe`; returns the exit status."""
    return commandline.run(
        evaluate,
        argv,
        doc=__doc__,
        define=define_flags,
        recipe={"The recipe of --protocol=published": recipe.published_probe()},
    )
