"""xsmae results results.jsonl --out=report

Makes tables and pictures of the rows that the evaluations wrote. --out gets results.md,
results.csv, the accuracy over scales of each protocol, and confusion matrices.
"""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run
from xsmae.errors import UserError, printable
from xsmae.evaluation.rows import Result, read
from xsmae.evaluation.tables import Table, create_tables, csv_text, label, markdown
from xsmae.figures import results as pictures


def define_flags(values: flags.FlagValues) -> None:
    """The flags; the files are what is left of the command line."""
    flags.DEFINE_string(
        "out", "results", "The folder of the report.", flag_values=values
    )


def write_report(files: list[Path], out: Path) -> list[Path]:
    """Everything of the rows in `files`; returns what was written.

    Raises UserError where a file is missing, has no rows or cannot be read.
    """
    rows = []
    for file in files:
        found = read(file)
        if not found:
            what = "has no rows" if file.exists() else "does not exist"
            raise UserError(f"{file} {what}: give the results.jsonl of xsmae knn")
        rows += found
    # The same row in two files is one.
    rows = list({row.identity: row for row in reversed(rows)}.values())[::-1]
    tables = create_tables(rows)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("results.md", markdown(tables)),
            ("results.csv", csv_text(rows)),
        ):
            (out / name).write_text(printable(text))
            written.append(out / name)
        for table in tables:
            protocol = table.protocol
            stem = f"{protocol.task}_{_slug(protocol.data['name'])}_{protocol.key}"
            path = out / f"scales_{stem}.png"
            if pictures.accuracy_by_scale(path, table):
                written.append(path)
            for row, name in whole_images(table):
                path = out / f"confusion_{stem}_{_slug(name)}.png"
                pictures.confusion_matrix(path, row, name)
                written.append(path)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; give another --out"
        ) from None
    return written


def whole_images(table: Table) -> list[tuple[Result, str]]:
    """Each encoder's row at 100 %, and its name in the table.

    Of its features the one that it is pooled by: a choice by accuracy would be one by
    the test images.
    """
    found = {}
    for line in table.lines:
        for column, row in line.cells.items():
            pooled = row.encoder["pooling"] in (None, line.feature)
            if column[0] == 100.0 and (pooled or label(line, table) not in found):
                found[label(line, table)] = row
    return [(row, name) for name, row in found.items()]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-")


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
