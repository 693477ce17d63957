"""Records the range of GSDs that a run has seen, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from xsmae.process.files import keep_rows, read_jsonl
from xsmae.process.log import LOG

NAME = "gsd_range.jsonl"  # in the workdir; other processes: in process_<number>/


class GsdRange:
    """Keeps the smallest and largest GSD of the crops, in metres per pixel, in a file.

    A row is added only when the range widens. A killed run resumes with the range of
    its steps up to `start`. If earlier steps ran without such a file, or with another
    number of processes, the range is unknown and no file is kept.
    """

    def __init__(self, folder: Path, *, start: int):
        self._path = folder / NAME
        rows = keep_rows(self._path, start if start else None)
        self._known = not start or _complete(rows)
        self._low, self._high = math.inf, -math.inf
        if not self._known:
            self._path.unlink(missing_ok=True)
        elif start:
            self._low, self._high = rows[-1]["low"], rows[-1]["high"]
        self._unwritten = False

    def add(self, step: int, gsd: np.ndarray) -> None:
        """Add the GSDs that the encoder got in a step."""
        if not self._known:
            return
        low, high = float(np.min(gsd)), float(np.max(gsd))
        if low < self._low or high > self._high or self._unwritten:
            self._low, self._high = min(low, self._low), max(high, self._high)
            self._write(step)

    def _write(self, step: int) -> None:
        row = {"schema": 1, "step": step, "low": self._low, "high": self._high}
        row["processes"] = jax.process_count()
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._unwritten = False
        except OSError as error:  # a full disk: try again in the next step
            if not self._unwritten:
                LOG.warning(
                    f"{self._path} cannot be written ({error.strerror}): trying again "
                    "after the next step"
                )
            self._unwritten = True


def seen_until(folder: Path, step: int) -> tuple[float, float] | None:
    """The range of the steps up to `step`, from a process's file in `folder`."""
    rows = [row for row in read_jsonl(folder / NAME) if row["step"] <= step]
    return (rows[-1]["low"], rows[-1]["high"]) if rows else None


def seen_by_all(folder: Path, step: int) -> tuple[float, float] | None:
    """The range over all processes. Each passes its own folder, and all must call."""
    own = np.float64(seen_until(folder, step) or (math.nan, math.nan))
    if jax.process_count() > 1:
        own = multihost_utils.process_allgather(own.astype(np.float32))
    low, high = np.reshape(own, (-1, 2)).T
    found = float(low.min()), float(high.max())  # NaN if a process does not know
    return found if np.isfinite(found).all() else None


def seen_by_run(workdir: Path, step: int) -> tuple[float, float] | None:
    """The range of the run in `workdir`; None if a process's file is missing."""
    rows = read_jsonl(workdir / NAME)
    others = range(1, rows[-1]["processes"] if rows else 1)
    folders = [workdir, *(workdir / f"process_{number}" for number in others)]
    ranges = [seen_until(folder, step) for folder in folders]
    if None in ranges:
        return None
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _complete(rows: list[dict]) -> bool:
    """True if `rows` cover this process's steps, with the present process count."""
    return bool(rows) and all(r["processes"] == jax.process_count() for r in rows)
