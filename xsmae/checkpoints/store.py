"""Orbax checkpoints of the whole state, with the data position and digests."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xsmae.checkpoints import digests
from xsmae.checkpoints import step as step_of
from xsmae.checkpoints.step import SCHEMA, create_handler, reason
from xsmae.errors import DamagedError, SaveError, UserError
from xsmae.process.log import LOG
from xsmae.train_state import TrainState

# A save writes `saving-STEP` and then renames it. A removal first renames the step.
SAVING, REMOVED = "saving-", "removed-"
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
# Free space that a save needs: this multiple of the state, plus bytes for metadata and
# the run's other files.
MARGIN, MARGIN_BYTES = 1.1, 32 * 2**20


class Checkpoints:
    """The checkpoints of a workdir, `<directory>/<step>/`; each one is complete.

    A step gets its name once its files and digests are on disk. Only then are older
    steps removed. keep: how many of the newest steps stay. keep_every: steps that are a
    multiple of it stay too; 0 means none. read_only: for looking into another run's
    workdir; otherwise the remains of a killed save are removed. with_digests: False to
    measure their cost. say: prints a line about a step that cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
        with_digests: bool = True,
        say: Callable[[str], None] = LOG.warning,
    ):
        self.directory = directory.absolute()
        self.keep, self.keep_every = keep, keep_every
        self.with_digests = with_digests
        self.say = say
        self._damaged: set[int] = set()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        if not read_only and jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write checkpoints to {directory}: {error.strerror}"
                ) from None
            self._remove_leftovers()
        self._checkpointer = ocp.AsyncCheckpointer(create_handler())

    def steps(self) -> list[int]:
        """The saved steps in order."""
        names = (path.name for path in self.directory.glob("[0-9]*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def latest_step(self) -> int | None:
        """The newest step that is not known to be damaged."""
        return max(set(self.steps()) - self._damaged, default=None)

    def save(self, step: int, state: TrainState, *, fingerprint: str) -> None:
        """Saves in the background; `fingerprint` is that of the data source.

        Raises SaveError if it cannot start, or if the previous save failed. `wait` and
        `poll` raise the errors of the background save.
        """
        self.wait()
        self._check_space(step, state)
        leaves = digests.to_host(state) if self.with_digests else None
        position = {
            "schema": SCHEMA if self.with_digests else 1,
            "batches": step,
            "source": fingerprint,
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        try:
            self._checkpointer.save(self._saving(step), args=args, force=True)
        except Exception as error:  # file system errors and others from Orbax
            raise self._failed(step, error) from error
        self._pending = self._worker.submit(self._prove, step, leaves, position)

    def wait(self) -> None:
        """Waits until everything is on disk; raises SaveError if the save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def poll(self) -> None:
        """Raises SaveError if the background save has failed so far."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def saving(self) -> bool:
        """True while a save runs, or until `wait` or `poll` has seen its end."""
        return self._pending is not None

    def restore(
        self, step: int, like: TrainState, *, fingerprint: str | None
    ) -> TrainState:
        """The state saved at `step`, with the shapes and placement of `like`.

        `like` contains arrays or `jax.ShapeDtypeStruct`s with shardings. Raises
        UserError if the checkpoint has other data or arrays, DamagedError if it is
        damaged. A fingerprint of None accepts any data.
        """
        return step_of.restore(
            self._path(step), like, fingerprint=fingerprint, say=self.say
        )

    def restore_newest(
        self, like: TrainState, *, fingerprint: str | None
    ) -> tuple[int, TrainState] | None:
        """The newest undamaged step and its state; None if nothing was saved.

        Prints a line for each damaged step that it skips. Raises DamagedError if no
        step is left, and UserError like `restore`.
        """
        for step in reversed(self.steps()):
            try:
                return step, self.restore(step, like, fingerprint=fingerprint)
            except DamagedError as error:
                self._pass_over(step, error)
        self._raise_if_none_is_whole()
        return None

    def restore_weights(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """`params` and `batch_stats` of the newest undamaged step.

        `like` contains them as arrays; other items of the step are ignored. Raises
        UserError with the names of weights that are missing, left over or of another
        shape.
        """
        for step in reversed(self.steps()):
            try:
                return step_of.restore_weights(self._path(step), like, say=self.say)
            except DamagedError as error:
                self._pass_over(step, error)
        self._raise_if_none_is_whole()
        raise UserError(f"{self.directory} contains no checkpoint")

    def remove_damaged(self, *, feed: Callable[[], None] = lambda: None) -> None:
        """Removes damaged steps of a complete run, so that no later start reads one.

        It reads the files of every step except the newest undamaged one, which was just
        restored or saved. It calls `feed` after each step, for the watchdog.
        """
        newest = self.latest_step()
        if newest is None or jax.process_index() != 0:
            return
        for step in self.steps():
            if step != newest and step not in self._damaged:
                try:
                    step_of.check_files(self._path(step))
                except DamagedError as error:
                    self._damaged.add(step)
                    self.say(f"step {step} is removed: {error}")
                feed()
        try:
            for step in self._damaged.intersection(self.steps()):
                self._remove(step)
        except OSError as error:
            self.say(f"damaged steps cannot be removed: {reason(error)}")

    def close(self) -> None:
        """Waits until everything is on disk; raises SaveError if the save failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._checkpointer.close()

    def _pass_over(self, step: int, error: DamagedError) -> None:
        self._damaged.add(step)
        self.say(f"step {step} is skipped: {error}")

    def _raise_if_none_is_whole(self) -> None:
        if self._damaged:
            raise DamagedError(
                f"{self.directory}: all saved steps are damaged; restore one from a "
                "backup, or move the folder away to start again"
            )

    def _check_space(self, step: int, state: TrainState) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = round(MARGIN * needed) + MARGIN_BYTES
        if not self.directory.is_dir():  # and its parent may be on another disk now
            raise SaveError(
                f"step {step} was not saved: {self.directory} no longer exists"
            )
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise self._failed(step, error) from None
        if free < needed:
            raise SaveError(
                f"step {step} was not saved: {self.directory} has "
                f"{free / 2**20:.0f} MiB free, expected {needed / 2**20:.0f} or more"
            )

    def _prove(
        self, step: int, leaves: Mapping[str, digests.Leaf] | None, position: Any
    ) -> None:
        """Waits for Orbax, adds the digests and renames the step; in the background."""
        path, saving = self._path(step), self._saving(step)
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() != 0:
                return
            if leaves is not None:
                wrong = [name for name, x in leaves.items() if not x.is_finite()]
                if wrong:
                    raise ValueError(f"{wrong[0]} has numbers that are not finite")
                digests.write(saving, leaves, position)
            if path.exists():  # a damaged step
                self._remove(step)
            saving.rename(path)
            digests.sync_folder(self.directory)
            self._damaged.discard(step)
        except Exception as error:
            raise self._failed(step, error) from error
        try:
            self._remove_old(step)
        except OSError as error:
            self.say(f"old steps cannot be removed: {reason(error)}")

    def _remove_old(self, newest: int) -> None:
        """Removes old steps, now that `newest` is complete.

        Damaged steps do not count as kept. Steps after the newest one are removed too:
        the run has resumed from an earlier step.
        """
        whole = [s for s in self.steps() if s <= newest and s not in self._damaged]
        kept = set(whole[-self.keep :])
        if self.keep_every:
            kept |= {step for step in whole if step % self.keep_every == 0}
        for step in set(self.steps()) - kept:
            self._remove(step)

    def _remove(self, step: int) -> None:
        # Rename first, so that a partly removed step is not read as a step.
        removed = self.directory / f"{REMOVED}{step}"
        self._path(step).rename(removed)
        shutil.rmtree(removed)

    def _remove_leftovers(self) -> None:
        for path in self.directory.iterdir():
            dead = path.name.startswith((SAVING, REMOVED)) or (
                ORBAX_TEMPORARY in path.name
            )
            if dead:
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _saving(self, step: int) -> Path:
        return self.directory / f"{SAVING}{step}"

    def _failed(self, step: int, error: Exception) -> SaveError:
        """Removes the remains of a failed save, to free space; returns its error."""
        for path in self.directory.glob(f"{SAVING}{step}*"):
            shutil.rmtree(path, ignore_errors=True)
        return SaveError(
            f"step {step} could not be saved in {self.directory} ({reason(error)})"
        )


def has_checkpoint(workdir: Path) -> bool:
    """True if a run has saved a step in `workdir`, damaged or not."""
    return any((workdir / "checkpoints").glob("[0-9]*"))
