"""The finished runs of the study and their rows, and cells of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from studies import config as systems
from studies.head_to_head import TASKS, read_runs
from xsmae.errors import UserError
from xsmae.evaluation.rows import AVERAGE, Result, read

NAMES = {
    "mae": "MAE",
    "sat_mae": "SatMAE (RGB)",
    "sat_mae-groups": "SatMAE, a group a band",
    "scale_mae": "Scale-MAE",
    "published": "Cross-Scale MAE `published`",
    "published-post": "Cross-Scale MAE `published`, post-norm",
    "published-temperature": "Cross-Scale MAE `published`, temperature 0.1",
    "corrected": "Cross-Scale MAE `corrected`",
    "published-small": "Cross-Scale MAE `published`, 0.1, small decoder",
    "mae-small": "MAE, small decoder",
    "simclr": "SimCLR",
    "scale_distill": "cross-scale distillation",
}
FEATURES = {"cls": "class token", "mean": "mean patch"}
CONTROLS = {"statistics": "image statistics", "thumbnail": "thumbnail of 8 px"}


@dataclasses.dataclass(frozen=True)
class Study:
    """The finished runs, and the rows of each task (`knn`, `linear_probe`)."""

    runs: list[dict]
    rows: dict[str, list[Result]]

    def seeds(self, system: str) -> list[dict]:
        """The runs of a system, sorted by seed."""
        found = [run for run in self.runs if run["system"] == system]
        return sorted(found, key=lambda run: run["seed"])

    def find(self, task: str, data: str, digests: Iterable[str], **fields) -> list:
        """The rows of encoders with `digests` on `data` that have these `fields`.

        A control that was measured again, because the protocol has a new field, counts
        once: its last row.
        """
        found = {
            row.encoder["digest"]: row
            for row in self.rows[task]
            if row.protocol.data["name"] == data
            and row.encoder["digest"] in set(digests)
            and all(getattr(row, name) == value for name, value in fields.items())
        }
        return list(found.values())

    def untrained(self, digest: str) -> str | None:
        """The digest of the random encoder of the same architecture."""
        rows = self.rows["knn"]
        shape = next(
            r.encoder["architecture"] for r in rows if r.encoder["digest"] == digest
        )
        for row in rows:
            same = row.encoder["architecture"] == shape
            if row.encoder["kind"] == "random" and same:
                return row.encoder["digest"]
        return None

    def control(self, kind: str) -> str:
        """The digest of a control without a network."""
        rows = self.rows["knn"]
        return next(r.encoder["digest"] for r in rows if r.encoder["kind"] == kind)

    @property
    def data(self) -> list[str]:
        """The data sets, in the order of their first rows."""
        return list(dict.fromkeys(r.protocol.data["name"] for r in self.rows["knn"]))

    @property
    def scales(self) -> list[float]:
        """The scales of kNN, in percent."""
        found = {r.scale for r in self.rows["knn"]} - {AVERAGE}
        return sorted(found)


def load(results: Path) -> Study:
    """Reads `results`; raises UserError if no run is finished."""
    runs = read_runs(results / "runs.jsonl")
    current = [r for r in runs if r["system"] in systems.SYSTEMS]
    if not current:
        raise UserError(
            f"no finished run in {results}: run python -m studies.head_to_head"
        )
    files = {task: results / f"{task}.jsonl" for task in TASKS}
    rows = {task: read(file) if file.exists() else [] for task, file in files.items()}
    return Study(current, rows)


def cell(rows: Sequence[Result]) -> str:
    """Mean ± standard deviation of several seeds, or one seed's bootstrap interval."""
    if not rows:
        return "-"
    values = [100 * row.value for row in rows]
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    (row,) = rows
    return f"{values[0]:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with text in its first column and numbers in the others."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    rows = [header, rule, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
