"""Records the images that a run could not use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from xsmae.data.pipeline import SHOWN, allowed_rejections
from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.process.files import keep_rows
from xsmae.process.log import LOG

NAMED = 5  # images that the terminal names; the file names all


class TooManyRejected(UserError):
    """A run has found more unusable images than it allows."""


class RejectedImages:
    """The unusable images of a source, in memory and in `rejected.jsonl`.

    resume_step: the step that the run resumes from. Later rows, left by a killed run,
    are removed, because they will be found again.
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
        """Record the replaced images of a step's batch; returns their number.

        Raises TooManyRejected if this process alone has found more bad images than
        `allowed_rejections`.
        """
        replaced = np.flatnonzero(batch["index"] != batch["requested"])
        for row in replaced:
            index, used = int(batch["requested"][row]), int(batch["index"][row])
            # Read a replaced image again to learn the reason. That is rare, and batches
            # need no column of strings.
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
            self.reasons[identifier] = "the first read failed, a second one did not"
        row = {"schema": 1, "step": step, "id": identifier}
        row["reason"] = self.reasons[identifier]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if len(self) <= NAMED:
            last = "; more are named only there" if len(self) == NAMED else ""
            LOG.warning(
                f"step {step}: {identifier} cannot be used "
                f"({self.reasons[identifier]}), {self.path.name} keeps it{last}"
            )

    def check_limit(self, number: int) -> None:
        """Raise TooManyRejected if `number` bad images are too many."""
        allowed = allowed_rejections(len(self.source), self.max_fraction)
        if number <= allowed:
            return
        # Name this process's images; the other processes have their own files.
        named = [f"{name} ({reason})" for name, reason in self.reasons.items()][:SHOWN]
        more = number - len(named)
        if more > 0:
            named.append(f"and {more} more")
        raise TooManyRejected(
            f"{number} of {len(self.source)} images cannot be used, more than the "
            f"{allowed} allowed (--config.input.max_rejected_fraction="
            f"{self.max_fraction:g}): {', '.join(named)}. Repair or remove the files "
            f"listed in {self.path.name} (xsmae check-data finds all others too), or "
            "raise --config.input.max_rejected_fraction"
        )
