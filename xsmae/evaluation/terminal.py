"""The table that a command prints at its end."""

from __future__ import annotations

from collections.abc import Sequence

from xsmae.evaluation.cells import cell, explain_marks
from xsmae.evaluation.details import without_truth
from xsmae.evaluation.matrices import matrices
from xsmae.evaluation.naming import changes
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tables import (
    BEATS,
    Table,
    create_tables,
    heading,
    rivals,
    values_of,
    verdict,
)


def terminal_table(results: Sequence[Result]) -> str:
    """The tables of the rows, as plain text."""
    lines = []
    for table in create_tables(results):
        rows = [["", "", *(heading(c, table) for c in table.columns), BEATS]]
        for line in table.lines:
            cells = [cell(line.cells.get(column)) for column in table.columns]
            rows.append([line.name, line.feature_name, *cells, verdict(line, table)])
        lines += _aligned(rows, names=2)
        for title, matrix in matrices(table.lines):
            lines += ["", title, *_aligned(matrix, names=1)]
        shown = values_of(table.protocol).removeprefix(", ")
        lines += ["", *[shown] * bool(shown), *changes(table.protocol), *rivals(table)]
        lines += [*explain_marks(table.lines), *_warnings(table)]
    return "\n".join(["", *lines])


def _aligned(rows: Sequence[Sequence[str]], *, names: int) -> list[str]:
    """Rows as lines: the first `names` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < names else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _warnings(table: Table) -> list[str]:
    rows = [row for line in table.lines for row in line.cells.values()]
    found = without_truth(table.lines)
    leaks = next(
        (r.leaks for r in rows if r.leaks["pixel_identical_test_images"]), None
    )
    if leaks is None:
        return found
    example = leaks["example"]
    return [
        *found,
        f"{leaks['pixel_identical_test_images']} test image(s) have the pixels of a "
        f"training image, e.g. {example['test']} and {example['train']}",
    ]
