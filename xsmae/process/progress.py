"""The progress of a long process: a line for each step, and rates."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """The line that a user sees for each logged step, and the rates since the last."""

    def __init__(self, *, start_step: int, num_steps: int, batch_size: int):
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.restart(start_step)

    def images_per_second(self, step: int) -> float:
        """Samples per second since the last call."""
        now = time.monotonic()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last, 1e-9)
        self.last, self.last_step = now, step
        return rate

    def waiting_for_data(self) -> float:
        """The share of time spent waiting in `receive` since the last call, 0 to 1.

        Devices may still compute the previous step meanwhile, so they wait for at most
        this share.
        """
        now = time.monotonic()
        share = self.waited / max(now - self.waited_from, 1e-9)
        self.waited, self.waited_from = 0.0, now
        return share

    def receive(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches and measures the time spent waiting for them."""
        while True:
            begin = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - begin
            yield batch

    def restart(self, step: int) -> None:
        """Starts counting at `step`."""
        self.start = self.last = self.waited_from = time.monotonic()
        self.start_step = self.last_step = step
        self.waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from all rates."""
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
