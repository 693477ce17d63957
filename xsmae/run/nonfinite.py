"""Records batches with a non-finite loss or gradient; ends a run with too many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.process.files import keep_rows

FILE = "nonfinite.jsonl"


class NonfiniteBatches:
    """Lists the images of such batches in `<workdir>/nonfinite.jsonl`.

    Such a step changes neither parameters nor optimiser (`train_step`). After `limit`
    of them in a row, `check` raises. resume_step: the step that the run resumes from.
    Later rows, left by a killed run, are removed.
    """

    def __init__(
        self, workdir: Path, source: Source, *, limit: int, resume_step: int | None
    ):
        self.path = workdir / FILE
        self.source = source
        self.limit = limit
        self.in_a_row = 0  # at the step that was last checked
        self._checked = resume_step or 0
        keep_rows(self.path, resume_step)

    def check(
        self, metrics: Mapping[str, Any], indices: np.ndarray, *, step: int
    ) -> None:
        """Check a step's metrics. Waits for them. indices: [batch], its images.

        Raises UserError after too many non-finite steps in a row.
        """
        if step <= self._checked:
            return
        self._checked = step
        self.in_a_row = count = int(metrics["nonfinite_in_a_row"])
        if not count:
            return
        ids = [self.source.id(int(index)) for index in indices if index >= 0]
        with self.path.open("a") as file:
            row = {"schema": 1, "step": step, "in_a_row": count, "ids": ids}
            file.write(json.dumps(row) + "\n")
        if count >= self.limit:
            raise UserError(
                f"the loss or its gradient was not finite in {count} steps in a row, "
                f"up to step {step}; {self.path} lists their images; the checkpoints "
                "are unchanged: start in a new --workdir with a lower "
                "--config.optim.learning_rate or with --config.optim.clip_norm=1.0"
            )
