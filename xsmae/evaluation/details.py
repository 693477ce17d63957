"""The other metrics of rows that have several, and each class's share of them."""

from __future__ import annotations

from collections.abc import Iterable

from xsmae.evaluation.rows import Result


def percent(value: float, low: float, high: float) -> str:
    """A number in percent and its interval: `80.6 [79.5, 81.6]`."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def details(named: Iterable[tuple[str, Result]]) -> tuple[list[str], list[list[str]]]:
    """A header and lines: the other metrics with intervals, then a class per column.

    named: rows of one protocol, each with its name. Rows with a single metric have no
    line. `-`: a class without a true or a predicted pixel.
    """
    found = [(name, row) for name, row in named if row.metrics]
    if not found:
        return [], []
    first = found[0][1]
    of_class = first.protocol.metric.removeprefix("m")
    header = [
        "",
        "scale",
        *first.metrics,
        *(f"{of_class} {name}" for name in first.class_names),
    ]
    lines = []
    for name, row in found:
        metrics = [percent(*row.metrics[metric]) for metric in first.metrics]
        values = [row.per_class.get(one) for one in row.class_names]
        shown = ["-" if x is None else f"{100 * x:.1f}" for x in values]
        lines.append([name, f"{row.scale:g} %", *metrics, *shown])
    return header, lines
