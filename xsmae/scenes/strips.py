"""Finished rows of a map on disk, so that a killed process resumes behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.process.files import write_json

if TYPE_CHECKING:
    from jaxtyping import UInt8

JOURNAL = "journal.json"


class Strips:
    """8-bit rows in plain files of a folder, and a journal of what is finished.

    shapes: name -> the shape of a row. job: the digest of what they are computed from.
    The journal is written after the rows, so a kill costs only rows that it does not
    count; they are written again. next_row: the first that is not finished.
    """

    def __init__(self, folder: Path, job: str, shapes: Mapping[str, tuple[int, ...]]):
        self.folder, self.job, self.shapes = folder, job, dict(shapes)
        self.next_row = self._finished()
        for name in self.shapes:
            self._path(name).touch()
            os.truncate(self._path(name), self.next_row * self._bytes(name))

    def add(self, rows: Mapping[str, UInt8[np.ndarray, "rows ..."]]) -> None:
        """Append rows to the files; `commit` makes them count."""
        for name, values in rows.items():
            with self._path(name).open("ab") as file:
                file.write(np.ascontiguousarray(values, np.uint8).tobytes())

    def commit(self, next_row: int) -> None:
        """Count the rows above `next_row` as finished."""
        for name in self.shapes:
            with self._path(name).open("rb") as file:
                os.fsync(file.fileno())
        content = {"job": self.job, "next_row": next_row, "rows": self._shapes()}
        write_json(self.folder / JOURNAL, content)
        self.next_row = next_row

    def rows(self, name: str) -> UInt8[np.ndarray, "rows ..."]:
        """The finished rows of a file, mapped into memory."""
        shape = (self.next_row, *self.shapes[name])
        return np.memmap(self._path(name), np.uint8, "r", shape=shape)

    def _finished(self) -> int:
        try:
            told = json.loads((self.folder / JOURNAL).read_text())
            same = told["job"] == self.job and told["rows"] == self._shapes()
            rows = int(told["next_row"]) if same else 0
            sizes = [self._path(name).stat().st_size for name in self.shapes]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        needed = [rows * self._bytes(name) for name in self.shapes]
        whole = all(s >= n for s, n in zip(sizes, needed, strict=True))
        return rows if whole else 0

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(shape) for name, shape in self.shapes.items()}

    def _bytes(self, name: str) -> int:
        return int(np.prod(self.shapes[name]))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.raw"
