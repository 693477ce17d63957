"""The rasters of a data set: a folder, a list, one file, or a table."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from xsmae.data import gdal
from xsmae.data.gsd import check_gsd
from xsmae.data.tables import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    column_of,
    confined,
    read_table,
    shown,
)
from xsmae.errors import UserError, printable

# Files of these in a folder are rasters. A VRT is a view of files that may lie beside
# it: it is given by name.
SUFFIXES = (".tif", ".tiff", ".jp2", ".img")
TABLES = (".csv", ".tsv")
BESIDE = (".msk", ".ovr", ".aux.xml")  # what GDAL reads with a raster
BAND_COLUMNS = ("bands",)
GSD_COLUMNS = ("gsd",)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One raster: its id (a path relative to the data set, or a URL), what GDAL opens,
    and what a table says of it."""

    id: str
    path: str
    label: str | None = None
    gsd: float | None = None
    bands: tuple[str, ...] | None = None


def list_rasters(
    data: str | os.PathLike | Sequence[str | os.PathLike],
) -> tuple[list[Entry], list[str]]:
    """The rasters of a folder (and below), a list, one file, or a table; and notes.

    A table has the columns path, and label, gsd and bands if it likes; an empty cell
    says nothing. Paths are relative to the table, names in `bands` are separated by
    spaces. UserError for what is not there.
    """
    if not isinstance(data, (str, os.PathLike)):
        return _of_list(list(data)), []
    name = gdal.dataset_name(data)
    if gdal.is_file(name) and os.path.isdir(name):
        return _of_folder(pathlib.Path(name))
    if gdal.is_file(name) and name.lower().endswith(TABLES):
        return _of_table(pathlib.Path(name)), []
    return _of_list([data]), []


def _of_list(paths: list[str | os.PathLike]) -> list[Entry]:
    names = [gdal.dataset_name(path) for path in paths]
    if not names:
        raise UserError("the list of rasters is empty; expected at least one")
    twice = [n for n, times in collections.Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{printable(twice[0])} is in the list twice; list it once")
    files = [name for name in names if gdal.is_file(name)]
    missing = [name for name in files if not os.path.exists(name)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} rasters do not exist, the first "
            f"{printable(missing[0])}"
        )
    root = os.path.commonpath([os.path.dirname(f) for f in files]) if files else ""
    ids = [os.path.relpath(n, root) if gdal.is_file(n) else n for n in names]
    return [Entry(i, name) for i, name in zip(ids, names, strict=True)]


def _of_folder(root: pathlib.Path) -> tuple[list[Entry], list[str]]:
    ids, others, seen = [], collections.Counter(), set()
    for folder, inner, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link to what was listed, or a loop
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                ids.append(os.path.relpath(os.path.join(folder, name), root))
            elif not name.lower().endswith(BESIDE):
                others[os.path.splitext(name)[1].lower()] += 1
    if not ids:
        raise UserError(
            f"no raster ({', '.join(SUFFIXES)}) in {printable(str(root))} or its "
            f"sub-folders ({others.total()} other files); give the folder that has them"
        )
    suffixes = ", ".join(
        f"{n} {s or 'without a suffix'}" for s, n in sorted(others.items())
    )
    notes = [f"left out: {suffixes}, which are no rasters by suffix"] if others else []
    return [Entry(i, os.path.join(root, i)) for i in sorted(ids)], notes


def _of_table(table: pathlib.Path) -> list[Entry]:
    header, rows = read_table(table)
    columns = [
        column_of(header, names)
        for names in (PATH_COLUMNS, LABEL_COLUMNS, GSD_COLUMNS, BAND_COLUMNS)
    ]
    if columns[0] is None:
        raise UserError(
            f"{table} has no path column: found {shown(header)}; expected one of "
            f"{', '.join(PATH_COLUMNS)}"
        )
    root = table.parent
    lines: dict[str, int] = {}
    entries = []
    for line, row in rows:
        where = f"line {line} of {table}"
        path, label, gsd, bands = ("" if c is None else row[c] for c in columns)
        if not gdal.is_remote(path) and not path.startswith("/vsi"):
            path = confined(path, root, os.path.realpath(root), where)
        if path in lines:
            raise UserError(
                f"{where}: {path!r} is also on line {lines[path]}; list it once"
            )
        lines[path] = line
        local = "://" not in path and not path.startswith("/vsi")
        entry = Entry(
            path,
            str(root / path) if local else path,
            label or None,
            check_gsd(gsd, where) if gsd else None,
            tuple(bands.split()) or None,
        )
        entries.append(entry)
    return entries
