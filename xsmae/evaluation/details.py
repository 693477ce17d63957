"""The other metrics of rows that have several, and each class's share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from xsmae.evaluation.rows import Result


class Line(Protocol):
    """Rows of one protocol, and their name."""

    name: str
    kind: str
    feature_name: str
    cells: Mapping[tuple, Result]


def percent(value: float, low: float, high: float) -> str:
    """A number in percent and its interval: `80.6 [79.5, 81.6]`."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def named(lines: Iterable[Line]) -> list[tuple[str, Result]]:
    """Each row with the name of its line."""
    return [(line.name, row) for line in lines for row in line.cells.values()]


def details(lines: Iterable[Line]) -> tuple[list[str], list[list[str]]]:
    """A header and lines: the other metrics with intervals, then a class per column.

    Only rows of segmentation have a line. `-`: a class without a true or a predicted
    pixel.
    """
    found = [(name, row) for name, row in named(lines) if _segmented(row)]
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
    shares = []
    for name, row in found:
        metrics = [percent(*row.metrics[metric]) for metric in first.metrics]
        values = [row.per_class.get(one) for one in row.class_names]
        shown = ["-" if x is None else f"{100 * x:.1f}" for x in values]
        shares.append([name, f"{row.scale:g} %", *metrics, *shown])
    return header, shares


def _segmented(row: Result) -> bool:
    return bool(row.metrics) and row.cells is None


def without_truth(lines: Iterable[Line]) -> list[str]:
    """A sentence per row with classes that are predicted, but have no true pixel.

    Their IoU is 0, in the mean of that row alone.
    """
    found = []
    for name, row in named(lines):
        true = np.sum(row.confusion, axis=1) if _segmented(row) else []
        absent = [
            one
            for one, count in zip(row.class_names, true, strict=False)
            if not count and one in row.per_class
        ]
        if absent:
            found.append(
                f"{name}, {row.scale:g} %: no test pixel is {' or '.join(absent)}, but "
                f"some are predicted: they count as IoU 0 in this row's "
                f"{row.protocol.metric}"
            )
    return found
