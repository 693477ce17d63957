"""xsmae knn --encoder=runs/quickstart --data=eurosat --data.root=DIR

Measures an encoder over scales: the most similar training images vote for the class of
a test image. Image statistics, a thumbnail and the same architecture with random
weights are measured alongside, as controls.

--cross_scale measures what changes if the test images have another scale than the
training images. --protocol=satdino sizes, crops and normalises images as SatDINO does,
to compare with its published numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.measure import measure
from xsmae.errors import UserError
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tasks import catalogue

# The flags that only the standard protocol uses.
STANDARD = ("k", "temperature", "cross_scale", "standardize", "block")


def define_flags(values: flags.FlagValues) -> None:
    """This command's own flags."""
    flags.DEFINE_enum(
        "protocol",
        "standard",
        ("standard", "satdino"),
        "standard: whole images, area-averaged, with the encoder's own normalisation. "
        "satdino: the central 7/8 of the side, resized bicubically, with mean and "
        "standard deviation of the training images; the class token; k is 20.",
        flag_values=values,
    )
    flags.DEFINE_integer("k", 20, "How many neighbours vote.", flag_values=values)
    flags.DEFINE_float(
        "temperature",
        0.07,
        "The weight of a vote is exp(cosine similarity / temperature).",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "cross_scale",
        False,
        "Measure every pair of --scales: training images at one, test images at the "
        "other.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "standardize",
        False,
        "Shift and scale every dimension of the features to mean 0 and standard "
        "deviation 1 over the training images.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "block",
        None,
        "The block whose tokens are used, from 1 to the encoder's depth, without the "
        "final norm. By default the last one, after the final norm.",
        flag_values=values,
    )


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure the encoder and its controls; prints the table."""
    values, config = commandline.parse(argv, define_flags, doc=__doc__)
    task = _task(values)
    if task.fixed_features:
        commandline.default(values, "feature", task.features)
    return measure(values, config, task, should_stop=should_stop)


def _task(values: flags.FlagValues) -> catalogue.Task:
    if values.protocol == "satdino":
        given = [name for name in STANDARD if values[name].present]
        if given:
            raise UserError(
                f"--{given[0]} has no meaning for protocol=satdino: leave it out, or "
                "give --protocol=standard"
            )
        return catalogue.knn_satdino()
    create = catalogue.knn_cross_scale if values.cross_scale else catalogue.knn
    names = ("k", "temperature", "standardize", "block")
    return create(**{name: values[name].value for name in names})


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae knn`; returns the exit status."""
    return commandline.run(evaluate, argv, doc=__doc__, define=define_flags)
