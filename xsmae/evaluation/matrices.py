"""Rows of evaluations across scales in tables: two means, and a matrix of cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from xsmae.evaluation.details import Line, percent
from xsmae.evaluation.rows import Result

# A mean over cells, by its name in `Result.metrics` -> its name in tables.
MEANS = {
    "diagonal": "same scale (diagonal)",
    "off_diagonal": "other scale (off-diagonal)",
}
CORNER = "bank / queries"


def columns_of(row: Result) -> dict[tuple, Result]:
    """The row by its column. A row with cells has two: one per mean."""
    if row.cells is None:
        return {row.column: row}
    return {
        (*row.column, name): dataclasses.replace(row, value=value, low=low, high=high)
        for name, (value, low, high) in row.metrics.items()
    }


def with_cells(lines: Iterable[Line]) -> list[tuple[Line, Result]]:
    """The lines whose rows have cells, each with its row of each set of scales."""
    found = {}
    for line in lines:
        for column, row in line.cells.items():
            if row.cells is not None:
                found.setdefault((id(line), column[:3]), (line, row))
    return list(found.values())


def scales_of(row: Result) -> list[str]:
    """`50 % (128 px)` for each scale of a row with cells."""
    return [f"{p:g} % ({s} px)" for p, s in zip(row.scales, row.size, strict=True)]


def matrices(lines: Iterable[Line]) -> list[tuple[str, list[list[str]]]]:
    """A title and a table per row with cells: banks are lines, queries are columns."""
    found = []
    for line, row in with_cells(lines):
        scales = scales_of(row)
        table = [[CORNER, *scales]]
        for scale, cells in zip(scales, row.cells, strict=True):
            table.append([scale, *(percent(*cell) for cell in cells)])
        own = line.feature_name == line.kind  # a pixel control has a single feature
        found.append((line.name + f", {line.feature_name}" * (not own), table))
    return found


def explain_means(lines: Iterable[Line]) -> list[str]:
    """What the two means are, if a line has them."""
    if not with_cells(lines):
        return []
    same, other = MEANS.values()
    return [
        f"bank: the training images, at the scale of the line of a matrix; queries: "
        f"the test images, at the scale of the column. {same}: the mean of the cells "
        f"with equal scales. {other}: the mean of all other cells"
    ]
