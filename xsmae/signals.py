"""Stopping a run between two steps when it is asked to."""

from __future__ import annotations

import os
import signal


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal`; a second one acts.

    signal: the number of the signal received, else None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()
        name = signal.Signals(number).name
        # Not print: a signal that arrives within another print must not start one.
        os.write(2, f"{name}: stopping after this step; again: at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
