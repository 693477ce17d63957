"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, W&B, the terminal."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tensorboardX import SummaryWriter

from xsmae.errors import UserError
from xsmae.files import keep_rows, read_jsonl

SCHEMA = 1

T = TypeVar("T")


class MetricsWriter:
    """Appends one JSON object a line to `metrics.jsonl`, and the same to TensorBoard.

    `resume_step` is the step that the run goes on from: later lines, which a killed run
    left behind, are dropped, since they will be written again.
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
        """One line for `step`; it is on disk when this returns.

        Where it cannot be written, which is said, it is written before the next one.
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
            os.ftruncate(self.file.fileno(), end)  # half a line
            print(f"{self.path} cannot be written ({error.strerror}), yet", flush=True)

    def _takes_events(self) -> bool:
        """Whether TensorBoard's thread is there: it ends where the disk is full.

        Its queue then fills, and the next event would wait for ever.
        """
        if self.events is not None:
            worker = self.events._get_file_writer().event_writer._worker
            if not worker.is_alive():
                print(
                    "TensorBoard's file ends here: it could not be written", flush=True
                )
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


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, see `read_jsonl`."""
    return read_jsonl(path)


def _plain(value) -> float | int | None:
    """A JSON number; null for NaN and infinity, which JSON does not have."""
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
    # The same workdir is the same run, also after a restart.
    name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project="xsmae", id=name, dir=str(workdir), config=dict(config), resume="allow"
    )


class Progress:
    """The line that a person sees for each logged step, and the rates of its window."""

    def __init__(self, *, start_step: int, num_steps: int, batch_size: int):
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.restart(start_step)

    def images_per_second(self, step: int) -> float:
        """Samples a second since this was last asked."""
        now = time.monotonic()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last, 1e-9)
        self.last, self.last_step = now, step
        return rate

    def waiting_for_data(self) -> float:
        """The share of the time since this was last asked spent in `receive`, 0 to 1.

        Devices that still compute the step before do not stand still meanwhile: their
        own share is at most that.
        """
        now = time.monotonic()
        share = self.waited / max(now - self.waited_from, 1e-9)
        self.waited, self.waited_from = 0.0, now
        return share

    def receive(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, the time that each is waited for counted."""
        while True:
            begin = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - begin
            yield batch

    def restart(self, step: int) -> None:
        """Count from `step` on."""
        self.start = self.last = self.waited_from = time.monotonic()
        self.start_step = self.last_step = step
        self.waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        begin = time.monotonic()
        yield
        spent = time.monotonic() - begin
        self.start += spent
        self.last += spent
        self.waited_from += spent

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        terms = ", ".join(
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("loss/") and "_view" not in name
        )
        done = max(step - self.start_step, 1)
        left = (time.monotonic() - self.start) / done * (self.num_steps - step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"step {step}/{self.num_steps}  epoch {metrics['epoch']:.2f}  "
            f"loss {metrics['loss']:.4f} "
            + (f"({terms})  " if terms else " ")
            + (
                f"{rate:.0f} images/s  {hours}:{minutes:02}:{seconds:02} left"
                if math.isfinite(rate := metrics["images_per_second"])
                else "compiled"
            )
        )
