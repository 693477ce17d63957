"""Saves a run's state and handles saves that fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from xsmae.checkpoints.store import Checkpoints
from xsmae.errors import SaveError
from xsmae.process.log import LOG
from xsmae.train_state import TrainState


class Saver:
    """Saves a run's state; logs failed saves and stops the run after too many.

    fingerprint: the fingerprint of the data. allowed: how many saves in a row may fail
    (`checkpoint.keep_going_without_checkpoints`). A save runs in the background, so
    `poll` detects its failure at a later step.
    """

    def __init__(self, checkpoints: Checkpoints, *, fingerprint: str, allowed: int):
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self.allowed = allowed
        self.failures = 0
        self._begun = checkpoints.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Saves in the background, once per step; SaveError after too many failures."""
        if step <= 0 or step == self._begun:
            return
        with self._counting():
            self.checkpoints.wait()
        with self._counting():
            self.checkpoints.save(step, state, fingerprint=self.fingerprint)
            self._begun = step

    def poll(self) -> None:
        """Checks for failed saves; SaveError after too many."""
        with self._counting():
            self.checkpoints.poll()

    def finish(self) -> None:
        """Waits for the last save; raises SaveError if it failed."""
        self.allowed = 0
        with self._counting():
            self.checkpoints.wait()
        if self.failures:
            raise SaveError(f"the last step was not saved; {self._what_is_left()}")

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            self._begun = None
            self.failures += 1
            if self.failures > self.allowed:
                raise SaveError(f"{error}; {self._what_is_left()}") from error
            LOG.warning(
                f"{error}; the run continues: {self.failures} of {self.allowed} saves "
                "in a row that may fail"
            )
        else:
            if self._begun is not None and not self.checkpoints.saving():
                self.failures = 0

    def _what_is_left(self) -> str:
        newest = self.checkpoints.latest_step()
        if newest is None:
            return "no step is saved; the same command starts again"
        return f"step {newest} is saved; the same command resumes from there"
