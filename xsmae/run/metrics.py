"""Writes the numbers of a run: `metrics.jsonl`, TensorBoard, W&B."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from xsmae.errors import UserError
from xsmae.process.files import keep_rows
from xsmae.process.log import LOG

SCHEMA = 1


class MetricsWriter:
    """Appends JSON lines to `metrics.jsonl`, and the same values to TensorBoard.

    resume_step: the step that the run resumes from. Later lines, left by a killed run,
    are removed, because they will be written again.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int | None,
        tensorboard: bool = True,
        wandb_config: Mapping | None = None,
    ):
        self.wandb = None
        if wandb_config is not None:
            self.wandb = _start_wandb(workdir, wandb_config)
        self.path = workdir / "metrics.jsonl"
        keep_rows(self.path, resume_step)
        self.file = self.path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self.events = None
        if tensorboard:
            purge_step = 0 if resume_step is None else resume_step + 1
            self.events = SummaryWriter(str(workdir), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line for `step`; it is on disk when this returns.

        If writing fails, a warning appears, and the line is written with the next one.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps({"schema": SCHEMA, "step": step, **values}) + "\n"
        self._unwritten.append(line.encode())
        self._write()
        numbers = {k: v for k, v in values.items() if v is not None}
        for name, value in numbers.items():
            if self._takes_events():
                self.events.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def _write(self) -> None:
        end = os.fstat(self.file.fileno()).st_size
        lines = b"".join(self._unwritten)
        try:
            if self.file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
            self._unwritten.clear()
        except OSError as error:
            os.ftruncate(self.file.fileno(), end)  # remove an incomplete line
            LOG.warning(
                f"{self.path} cannot be written ({error.strerror}): trying again with "
                "the next line"
            )

    def _takes_events(self) -> bool:
        """True while TensorBoard's thread is alive. It dies when the disk is full.

        Its queue then fills up, and the next event would block forever.
        """
        if self.events is not None:
            worker = self.events._get_file_writer().event_writer._worker
            if not worker.is_alive():
                LOG.warning("TensorBoard's file cannot be written and ends here")
                self.events = None
        return self.events is not None

    def close(self) -> None:
        if self._unwritten:
            self._write()
        self.file.close()
        if self._takes_events():
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def _plain(value) -> float | int | None:
    """A JSON number; null for NaN and infinity, which JSON cannot express."""
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _start_wandb(workdir: Path, config: Mapping):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--config.wandb=true, but wandb is not installed: pip install wandb"
        ) from None
    # The same workdir continues the same W&B run, also after a restart.
    name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project="xsmae", id=name, dir=str(workdir), config=dict(config), resume="allow"
    )
