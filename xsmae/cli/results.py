"""Tables and pictures of result rows: `python -m xsmae.results FILE... --out=DIR`.

Writes results.md, results.csv, for each protocol the accuracy against the scale, and
for each encoder and data set the confusion matrix at 100 %.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from absl import flags

from xsmae.errors import UserError, printable
from xsmae.evaluation.rows import Result, read
from xsmae.evaluation.tables import Table, create_tables, csv_text, label, markdown
from xsmae.figures import results as pictures


def define_flags(values: flags.FlagValues) -> None:
    """The flags; the files are what is left of the command line."""
    flags.DEFINE_string(
        "out", "results", "The folder that is written to.", flag_values=values
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
            raise UserError(
                f"{file} {what}: give the results.jsonl of python -m xsmae.knn"
            )
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


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv if argv is None else argv
    values = flags.FlagValues()
    define_flags(values)
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(__doc__, values.get_help(), sep="\n\n")
        return 0
    try:
        try:
            files = values(argv)[1:]
        except flags.Error as error:
            raise UserError(" ".join(str(error).split())) from None
        if not files:
            raise UserError("no file is given: python -m xsmae.results results.jsonl")
        for path in write_report([Path(file) for file in files], Path(values.out)):
            print(path)
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return 2
    return 0
