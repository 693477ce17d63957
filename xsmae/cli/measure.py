"""Measures what the flags of an evaluation name, and prints the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags

from xsmae.errors import UserError, printable
from xsmae.evaluation.evaluate import evaluate
from xsmae.evaluation.parts import name_of
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tasks.catalogue import Task
from xsmae.evaluation.terminal import terminal_table


def measure(
    values: flags.FlagValues,
    config: ml_collections.ConfigDict,
    task: Task,
    *,
    should_stop: Callable[[], bool],
    **how: Any,
) -> list[Result]:
    """Measure the encoder and its controls; prints their table, returns the rows.

    values, config: from `evaluation.parse`. how: other arguments of `evaluate`.
    """
    names = (
        "base_size", "gsd", "feature", "results", "cache", "seed", "batch_size", "name",
        "missing_bands",
    )  # fmt: skip
    rows = evaluate(
        values.encoder,
        config.train,
        config.test,
        task=task,
        scales=percents_of(values),
        data_name=name_of(config.data, config.train),
        config=config,
        should_stop=should_stop,
        **{name: values[name].value for name in names},
        **how,
    )
    print_table(rows, values.results)
    return rows


def define_out(values: flags.FlagValues) -> None:
    """Define the flag --out of the commands that train a classifier."""
    flags.DEFINE_string(
        "out",
        "heads",
        "The folder that gets a folder per result of the encoder, with the trained "
        "head. --out= keeps no head.",
        flag_values=values,
    )


def percents_of(values: flags.FlagValues) -> list[float]:
    """The numbers of --scales. Raises UserError if one is no number."""
    try:
        return [float(text) for text in values.scales]
    except ValueError:
        raise UserError(
            f"scales={','.join(values.scales)}, expected percent such as 12.5,25,50,100"
        ) from None


def print_table(rows: Sequence[Result], results: str) -> None:
    """Print the table of the rows, and the file that has them."""
    print(printable(terminal_table(rows)), f"rows: {results}", sep="\n", flush=True)
