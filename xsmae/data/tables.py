"""The source that reads a CSV of images: paths inside a root, labels, GSDs."""

import csv
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from xsmae.data.files import FileSource, Listing, check_folder, file_size
from xsmae.data.gsd import GSD_HELP, check_gsd
from xsmae.data.images import MAX_PIXELS, MIN_SIDE
from xsmae.data.records import number
from xsmae.data.splits import split_indices
from xsmae.errors import UserError

# The first name present in the header is used. SatMAE (util/datasets.py,
# SentinelIndividualImageDataset) and the official Cross-Scale MAE repository
# (util/datasets.py, Dataset_fmow_sentinel) read the names image_path and category.
PATH_COLUMNS = ("path", "image_path", "file_path", "filepath", "filename", "image")
LABEL_COLUMNS = ("label", "category", "class", "class_name")
GSD_COLUMNS = ("gsd",)


def read_listing(
    csv_path: str | os.PathLike,
    *,
    root: str | os.PathLike | None,
    gsd: float | None,
) -> tuple[pathlib.Path, Listing]:
    """Reads and checks a CSV of images, as `CsvSource` describes it.

    Returns:
      the root folder, and all records. `gsds` is None if neither the table nor `gsd`
      gives them.
    """
    table = pathlib.Path(csv_path).expanduser().absolute()
    header, rows = read_table(table)
    folder = table.parent if root is None else check_folder(root)
    path_column = column_of(header, PATH_COLUMNS)
    if path_column is None:
        raise UserError(
            f"{table} has no path column: found {shown(header)}; expected one of "
            f"{', '.join(PATH_COLUMNS)}"
        )
    label_column = column_of(header, LABEL_COLUMNS)
    gsd_column = column_of(header, GSD_COLUMNS)
    if gsd_column is not None and gsd is not None:
        raise UserError(
            f"{table} has a gsd column and gsd={gsd} is given too; remove one of them"
        )

    real_root = os.path.realpath(folder)
    lines: dict[str, int] = {}
    texts, gsds = [], []
    for line, row in rows:
        where = f"line {line} of {table}"
        path = confined(row[path_column], folder, real_root, where)
        if path in lines:
            raise UserError(
                f"{where}: {path!r} is also on line {lines[path]}; list each path once"
            )
        lines[path] = line
        if label_column is not None:
            if not row[label_column]:
                raise UserError(
                    f"{where}: the column {header[label_column]!r} is empty; fill it "
                    "in, or remove the column"
                )
            texts.append(row[label_column])
        if gsd_column is not None:
            gsds.append(check_gsd(row[gsd_column], where))
    ids = list(lines)
    sizes = [(file_size(folder / name),) for name in ids]
    if all(size == (-1,) for size in sizes):
        raise UserError(
            f"none of the {len(ids)} images in {table} exists, the first is "
            f"{ids[0]!r}; set root to the folder that the paths are relative to"
        )
    labels, names = _number_labels(texts) if texts else (None, ())
    if gsd is not None:
        gsds = [check_gsd(gsd, "gsd")] * len(ids)
    return folder, Listing(ids, sizes, labels, names, np.array(gsds) if gsds else None)


def gsds_from_csv(
    csv_path: str | os.PathLike, ids: Sequence[str], *, root: pathlib.Path
) -> np.ndarray:
    """Reads the GSD of every id from a CSV with the columns path and gsd.

    Paths are relative to `root` or absolute.

    Returns:
      float64 [len(ids)], metres per pixel.

    Raises:
      UserError: no such table or columns, a bad GSD, an id that is not listed.
    """
    table = pathlib.Path(csv_path).expanduser().absolute()
    header, rows = read_table(table)
    path_column = column_of(header, PATH_COLUMNS)
    gsd_column = column_of(header, GSD_COLUMNS)
    if path_column is None or gsd_column is None:
        raise UserError(
            f"{table} has the columns {shown(header)}; expected path and gsd"
        )
    gsds = {}
    real_root = os.path.realpath(root)
    for line, row in rows:
        where = f"line {line} of {table}"
        path = _relative(row[path_column], root, real_root)
        if path in gsds:
            raise UserError(f"{where}: {path!r} is listed twice; list each path once")
        gsds[path] = check_gsd(row[gsd_column], where)
    missing = [name for name in ids if name not in gsds]
    if missing:
        raise UserError(
            f"{table} has no GSD for {len(missing)} of {len(ids)} images, the first is "
            f"{missing[0]!r}; add a line for each"
        )
    return np.array([gsds[name] for name in ids])


def read_table(table: pathlib.Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header in lower case, and (line number, cells) of each row with content."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=delimiter)
            rows = [(reader.line_num, [c.strip() for c in row]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{table} cannot be read as a UTF-8 CSV "
            f"({getattr(error, 'strerror', None) or error}); give a table with a header"
        ) from None
    rows = [(line, row) for line, row in rows if any(row)]
    if len(rows) < 2:
        raise UserError(
            f"{table} has {len(rows)} lines; expected a header and one line per image"
        )
    header = [name.lower() for name in rows.pop(0)[1]]
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"line {line} of {table} has {len(row)} cells, expected {len(header)} "
                "as in the header; quote cells that contain the delimiter"
            )
    return header, rows


def column_of(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Where the first of the names is in the header; None if none is."""
    return next((header.index(name) for name in names if name in header), None)


def shown(header: Sequence[str]) -> str:
    """The names on one line, with control characters escaped."""
    return ", ".join(repr(name)[1:-1] for name in header)


def _number_labels(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        return number([int(text) for text in texts])
    except ValueError:
        return number(texts)


def _relative(path: str, root: pathlib.Path, real_root: str) -> str:
    """`path` with forward slashes, relative to the root if it lies inside it."""
    for folder in (os.path.abspath(root), real_root):
        inside = path.startswith("/") and ".." not in path.split("/")
        if inside and pathlib.PurePosixPath(path).is_relative_to(folder):
            return pathlib.PurePosixPath(path).relative_to(folder).as_posix()
    return pathlib.PureWindowsPath(path).as_posix()


def confined(path: str, root: pathlib.Path, real_root: str, where: str) -> str:
    """`path` relative to the root, with forward slashes; UserError if it leads out."""
    relative = _relative(path, root, real_root)
    parts = pathlib.PureWindowsPath(relative)
    outside = parts.drive or parts.root or ".." in parts.parts
    if not path or outside or "\0" in path:
        raise UserError(
            f"{where}: the path is {path!r}, expected a path inside the root folder "
            f"{root}, relative or absolute, without '..'"
        )
    real = os.path.realpath(os.path.join(real_root, relative))
    if not real.startswith(real_root.rstrip("/") + "/"):
        raise UserError(
            f"{where}: {path!r} is a link to a file outside the root folder; copy the "
            "file, or give a root that contains both"
        )
    return relative


class CsvSource(FileSource):
    """The images that a CSV lists, in its order.

    The header names the columns in upper or lower case: one of `PATH_COLUMNS`, and
    optionally one of `LABEL_COLUMNS` and `gsd`. Other columns are ignored. The
    delimiter is the most frequent of comma, semicolon and tab in the header. Labels are
    text (numbered in sorted order) or whole numbers (numbered in ascending order). Each
    CSV numbers its own labels; use one CSV and `split` so that training and test
    numbers agree.

    Paths are relative to `root` or absolute, and must stay inside it. A path with `..`,
    or a path or link to a file outside, is a UserError with its line number. A missing
    file is a BadImageError when it is read; if all files are missing, it is a
    UserError.

    Args:
      csv_path: the table, UTF-8.
      root: the folder that paths are relative to; None: the folder of the CSV.
      gsd: metres per pixel of every image, if the table has no `gsd` column.
      split, test_fraction: see `splits`; an id is a path relative to `root`.
      min_side, max_pixels: see `images.decode`.

    Raises:
      UserError: anything wrong with the table, the GSD or the split.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike,
        *,
        root: str | os.PathLike | None = None,
        gsd: float | None = None,
        split: str = "all",
        test_fraction: float = 0.1,
        min_side: int = MIN_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        folder, listing = read_listing(csv_path, root=root, gsd=gsd)
        if listing.gsds is None:
            raise UserError(
                f"{csv_path} has no gsd column and gsd is not given: {GSD_HELP}, or "
                "add the column"
            )
        chosen = split_indices(listing.ids, listing.labels, split, test_fraction)
        super().__init__(
            folder, listing.take(chosen), min_side=min_side, max_pixels=max_pixels
        )
