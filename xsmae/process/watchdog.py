"""Ends a run that hangs, so that it can be started again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from xsmae.process.signals import end_at_once

FILE = "hang.log"
LOOKS = 20  # checks per time limit
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again


class Watchdog:
    """Ends the process if `feed` was not called for `minutes`; 0: never.

    It first writes the stack of every thread to `path`, and one line to stderr. A
    hanging process saves nothing, so the run's newest checkpoint is unchanged.
    """

    def __init__(self, path: Path, *, minutes: float):
        self.path = path
        self.minutes = minutes
        self._fed = 0  # the number of calls

    def feed(self) -> None:
        """Reports progress."""
        self._fed += 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the process while inside."""
        if self.minutes == 0:
            yield
            return
        left = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(left,), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def _watch(self, left: threading.Event) -> None:
        # Count checks instead of reading the clock: the clock continues while the
        # process or its machine is suspended, and that is not a hang.
        before, unfed = self._fed, 0
        while not left.wait(60 * self.minutes / LOOKS):
            unfed = unfed + 1 if self._fed == before else 0
            before = self._fed
            if unfed >= LOOKS:
                self._end()

    def _end(self) -> None:
        where = f"the stack of each thread is in {self.path}"
        try:
            with self.path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"{self.path} cannot be written ({error.strerror})"
            faulthandler.dump_traceback(all_threads=True)
        line = (
            f"xsmae: no step in {self.minutes:g} minutes (watchdog_minutes): ending; "
            f"{where}; the same command resumes from the newest checkpoint\n"
        )
        os.write(2, line.encode())
        end_at_once(EXIT_STATUS)
