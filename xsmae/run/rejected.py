"""The account of the images that a run could not use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from xsmae.data.pipeline import SHOWN, allowed_rejections
from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.process.files import keep_rows


class TooManyRejected(UserError):
    """More images of a run cannot be used than it allows."""


class RejectedImages:
    """Which images of a source could not be used, in memory and in `rejected.jsonl`.

    `resume_step` is the step that the run goes on from: what later steps of a killed
    run found is dropped, since they will find it again.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        *,
        max_fraction: float,
        resume_step: int | None = None,
    ):
        self.path = path
        self.source = source
        self.max_fraction = max_fraction
        rows = keep_rows(path, resume_step)
        self.reasons: dict[str, str] = {row["id"]: row["reason"] for row in rows}

    def __len__(self) -> int:
        return len(self.reasons)

    def check(self, batch: dict[str, np.ndarray], *, step: int) -> int:
        """Account for the replaced images of a step's batch; returns how many it holds.

        Raises TooManyRejected where more images are bad than `allowed_rejections`, by
        what this process has seen.
        """
        replaced = np.flatnonzero(batch["index"] != batch["requested"])
        for row in replaced:
            index, used = int(batch["requested"][row]), int(batch["index"][row])
            # A replaced image is read again for its reason: rare, and it spares every
            # batch a column of texts.
            while index != used:
                self._reject(index, step)
                self.check_limit(len(self))
                index = (index + 1) % len(self.source)
        return len(replaced)

    def _reject(self, index: int, step: int) -> None:
        identifier = self.source.id(index)
        if identifier in self.reasons:
            return
        try:
            self.source[index]
        except BadImageError as error:
            self.reasons[identifier] = str(error)
        else:
            self.reasons[identifier] = "could not be read at first, later it could"
        row = {"schema": 1, "step": step, "id": identifier}
        row["reason"] = self.reasons[identifier]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def check_limit(self, number: int) -> None:
        """Raises TooManyRejected where so many bad images, of all processes, are."""
        allowed = allowed_rejections(len(self.source), self.max_fraction)
        if number <= allowed:
            return
        # Those of this process; the others' are in their own files.
        named = [f"{name} ({reason})" for name, reason in self.reasons.items()][:SHOWN]
        more = number - len(named)
        if more > 0:
            named.append(f"and {more} more")
        raise TooManyRejected(
            f"{number} of {len(self.source)} images cannot be used, more than the "
            f"{allowed} allowed (--config.input.max_rejected_fraction="
            f"{self.max_fraction:g}): {', '.join(named)}. Mend or remove the files "
            f"listed in {self.path.name}, xsmae check-data finds all others "
            "too; or raise --config.input.max_rejected_fraction"
        )
