"""xsmae knn --encoder=runs/quickstart --data=eurosat --data.root=DIR

Measures an encoder over scales: an image gets the class that the most similar training
images vote for. Image statistics, a thumbnail and the same architecture with random
weights are measured alongside, as controls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.setup import measure_all, open_setup
from xsmae.errors import UserError
from xsmae.evaluation.measure import of_frozen_features
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tasks.knn import knn_predict


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command alone."""
    flags.DEFINE_integer("k", 20, "How many neighbours vote.", flag_values=values)
    flags.DEFINE_float(
        "temperature",
        0.07,
        "The weight of a vote is exp(cosine similarity / temperature).",
        flag_values=values,
    )


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure what the flags name, and its controls; prints the table."""
    values, config = commandline.parse(argv, define_flags, doc=__doc__)
    if values.k < 1 or not values.temperature > 0:
        raise UserError(
            f"k={values.k}, temperature={values.temperature}, expected k of 1 or more "
            "and a temperature above 0"
        )
    setup = open_setup(values, config)
    if values.k > len(setup.parts.train):
        raise UserError(
            f"k={values.k} is more than the {len(setup.parts.train)} training images: "
            f"give --k={len(setup.parts.train)} or less"
        )
    predict = functools.partial(
        knn_predict,
        k=values.k,
        temperature=values.temperature,
        should_stop=should_stop,
    )
    options = {"k": values.k, "temperature": values.temperature}
    outcomes = functools.partial(of_frozen_features, predict=predict)
    return measure_all(setup, values, "knn", options, outcomes, should_stop=should_stop)


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae knn`; returns the exit status."""
    return commandline.run(evaluate, argv, doc=__doc__, define=define_flags)
