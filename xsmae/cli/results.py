"""xsmae results results.jsonl --out=report

Makes tables and figures of the rows that evaluations wrote. --out gets results.md,
results.csv, a plot of accuracy or mIoU by scale per protocol, confusion matrices; of
segmentation the IoU of each class; of kNN across scales a heat map per encoder.
"""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run
from xsmae.errors import UserError, printable
from xsmae.evaluation.matrices import with_cells
from xsmae.evaluation.rows import Result, read
from xsmae.evaluation.spreadsheet import csv_text
from xsmae.evaluation.tables import Line, Table, create_tables, keeps_size, markdown
from xsmae.figures import cross_scale
from xsmae.figures import results as pictures


def define_flags(values: flags.FlagValues) -> None:
    """The flags; all other arguments are files."""
    flags.DEFINE_string(
        "out", "results", "The folder of the report.", flag_values=values
    )


def write_report(files: list[Path], out: Path) -> list[Path]:
    """Write the report of the rows in `files`; returns the written files.

    Raises UserError if a file is missing, has no rows or cannot be read.
    """
    rows = []
    for file in files:
        found = read(file)
        if not found:
            what = "has no rows" if file.exists() else "does not exist"
            raise UserError(
                f"{file} {what}: give the results.jsonl of an evaluation, such as "
                "xsmae knn"
            )
        rows += found
    # A row that is in two files counts once.
    rows = list({row.identity: row for row in reversed(rows)}.values())[::-1]
    tables = create_tables(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures = {table.protocol.key: draw(table, out) for table in tables}
        texts = {"results.md": markdown(tables, figures), "results.csv": csv_text(rows)}
        for name, text in texts.items():
            (out / name).write_text(printable(text))
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; give another --out"
        ) from None
    drawn = [name for of_table in figures.values() for _, name in of_table]
    return [out / name for name in (*texts, *drawn)]


def draw(table: Table, out: Path) -> list[tuple[str, str]]:
    """Draw the figures of a table; returns the title and file name of each."""
    protocol = table.protocol
    stem = f"{protocol.task}_{_slug(protocol.data['name'])}_{protocol.key}"
    drawn = []
    name = f"scales_{stem}.png"
    if pictures.accuracy_by_scale(out / name, table):
        drawn.append((f"{table.heading}: {protocol.metric} by scale", name))
    whole = whole_images(table)
    if whole and keeps_size(protocol):
        name = f"classes_{stem}.png"
        pictures.class_bars(out / name, whole, table)
        of_class = protocol.metric.removeprefix("m")
        drawn.append((f"{table.heading}: {of_class} of each class", name))
    for row, line in whole:
        name = _file_of(line, f"confusion_{stem}", drawn)
        pictures.confusion_matrix(out / name, row, line.name, data=table.data)
        title = f"{table.heading}: confusion of {line.name}, {line.feature_name}"
        drawn.append((title, name))
    return drawn + draw_across(table, out, stem)


def draw_across(table: Table, out: Path, stem: str) -> list[tuple[str, str]]:
    """Draw a heat map per encoder and set of scales, of rows across scales.

    One colour range for all of the table; returns the title and file name of each.
    """
    pairs, drawn = with_cells(table.lines), []
    encoders: dict[tuple, list[tuple[Line, Result]]] = {}
    for line, row in pairs:
        encoders.setdefault((line.name, row.column), []).append((line, row))
    for of_encoder in encoders.values():
        lines, rows = zip(*of_encoder, strict=True)
        name = _file_of(lines[0], f"cross_scale_{stem}", drawn)
        cross_scale.heat_map(
            out / name,
            rows,
            lines[0].name,
            data=table.data,
            limits=cross_scale.colour_range([row for _, row in pairs]),
        )
        drawn.append((f"{table.heading}: {lines[0].name} across scales", name))
    return drawn


def _file_of(line: Line, stem: str, drawn: list[tuple[str, str]]) -> str:
    """The name of a line's figure, which no other in `drawn` has."""
    name = f"{stem}_{_slug(line.name)}.png"
    if name in dict(drawn).values() or not _slug(line.name):
        name = f"{stem}_{line.digest}_seed{line.seed}.png"
    return name


def whole_images(table: Table) -> list[tuple[Result, Line]]:
    """Each encoder's row at 100 %, and its line in the table.

    The row is that of the encoder's own pooling. Choosing by accuracy would mean
    choosing by the test images.
    """
    found = {}
    for line in table.lines:
        for column, row in line.cells.items():
            pooled = row.encoder["pooling"] in (None, line.feature)
            if column[0] == 100.0 and (pooled or line.name not in found):
                found[line.name] = (row, line)
    return list(found.values())


def _slug(name: str) -> str:
    """An ASCII name for files and links, short enough for file systems."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:80].strip("-")


def report(argv: list[str]) -> int:
    """Write the report and print its files; returns the exit status."""
    values = flags.FlagValues()
    define_flags(values)
    files = parse_flags(values, argv, files=True)
    if not files:
        raise UserError(f"no file is given: {example(__doc__)}")
    for path in write_report([Path(file) for file in files], Path(values.out)):
        print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae results`; returns the exit status."""
    return run(report, argv, doc=__doc__, sections={"Flags": define_flags})
