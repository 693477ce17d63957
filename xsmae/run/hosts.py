"""Runs with several processes, on one host or many: joining, stopping together."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from xsmae.errors import UserError, printable
from xsmae.process.signals import StopRequest, end_at_once
from xsmae.process.watchdog import EXIT_STATUS

# Range of the seconds without a heartbeat after which a process counts as ended. The
# value is 25 % of the watchdog's time within this range; the maximum is jax's default.
HEARTBEATS = (10, 100)


def join(values: flags.FlagValues, *, watchdog_minutes: float) -> None:
    """Join the other processes if the flags describe several.

    Call it before any device is used. Raises UserError if the others are not found.
    """
    given = [values.coordinator, values.num_processes, values.process_id]
    if not values.hosts and given == [None] * 3:
        return
    if not values.hosts:
        _check(values)
    shortest, longest = HEARTBEATS
    seconds = round(60 * watchdog_minutes / 4) or longest
    try:
        jax.distributed.initialize(
            *given, heartbeat_timeout_seconds=min(max(seconds, shortest), longest)
        )
    except (ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes of this run do not find each other ({reason}): give each "
            "of them --coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def _check(values: flags.FlagValues) -> None:
    given = (values.coordinator, values.num_processes, values.process_id)
    host, _, port = (values.coordinator or "").rpartition(":")
    sound = None not in given and host and port.isdigit()
    if not sound or not 0 <= values.process_id < values.num_processes:
        raise UserError(
            f"--coordinator={given[0]} --num_processes={given[1]} --process_id="
            f"{given[2]}, expected HOST:PORT, a number N and a number from 0 to N - 1"
        )


def own_folder(workdir: Path) -> Path:
    """This process's own folder for its files: process 0 uses the workdir itself."""
    index = jax.process_index()
    return workdir / f"process_{index}" if index else workdir


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """With several processes, end at once if this one or another fails.

    Otherwise the others would wait in an exchange for the failed process, and Python's
    exit would wait for the others for minutes.
    """
    try:
        yield
    except UserError as error:
        if not jax.distributed.is_initialized():
            raise
        _end(str(error), 2)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        reason = " ".join(str(error).split())[:200]
        _end(
            f"an exchange with another process failed ({reason}), so this process "
            "ends: run the same commands again to resume from the newest checkpoint",
            EXIT_STATUS,
        )


def end_alone(error: UserError) -> None:
    """With several processes, end this one at once; with one process, return.

    The others then end too. This process cannot save or close shared things first: it
    would wait for the others, which wait for it in the next step.
    """
    if jax.distributed.is_initialized():
        _end(str(error), 2)


def _end(line: str, status: int) -> None:
    os.write(2, f"xsmae: {printable(line)}\n".encode())
    end_at_once(status)


def counted_together(ids: Collection[str], other: int) -> tuple[int, int]:
    """The number of distinct ids of all processes, and the sum of their `other`.

    All processes must call this after the same step; it waits for them.
    """
    if jax.process_count() == 1:
        return len(ids), other
    counts, others = multihost_utils.process_allgather(np.int32([len(ids), other])).T
    # Strings cannot be exchanged, so exchange 64 bits of their digests.
    digests = np.zeros((counts.max(), 2), np.uint32)
    for row, name in zip(digests, ids, strict=False):
        encoded = name.encode(errors="surrogateescape")  # file names are any bytes
        row[:] = np.frombuffer(hashlib.sha256(encoded).digest()[:8], np.uint32)
    distinct = set()
    if counts.any():
        for found, count in zip(
            multihost_utils.process_allgather(digests), counts, strict=True
        ):
            distinct |= set(map(tuple, found[:count].tolist()))
    return len(distinct), int(others.sum())


class StopTogether:
    """Decides whether to stop after a step, the same way in all processes.

    A single process stops as soon as it gets a signal. Several processes exchange their
    signals at every step and read the result one step later, so that none waits.
    signal: the signal they agreed on, or None.
    """

    def __init__(self, stop: StopRequest, mesh: jax.sharding.Mesh):
        self._stop = stop
        self._several = jax.process_count() > 1
        self._sharding = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(mesh.axis_names)
        )
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(lambda asked: asked.max(), out_shardings=replicated)
        self._said = None
        self._agreed: int | None = None

    @property
    def signal(self) -> int | None:
        return self._agreed if self._several else self._stop.signal

    def asked(self) -> bool:
        """True if a stop is agreed on. Several processes agree between steps only."""
        return self.signal is not None

    def after_step(self) -> bool:
        """True if the run stops now. Every process must call it after every step."""
        if self._several:
            said, self._said = self._said, self._largest(self._own())
            if said is not None:
                self._agreed = int(said) or None
        return self.signal is not None

    def after_all(self) -> bool:
        """Like `after_step`, with the signals up to now; waits for all processes."""
        if self._several and self._agreed is None:
            asked = multihost_utils.process_allgather(np.int32(self._stop.signal or 0))
            self._agreed = int(asked.max()) or None
        return self.signal is not None

    def _own(self) -> jax.Array:
        asked = np.full(jax.local_device_count(), self._stop.signal or 0, np.int32)
        return jax.make_array_from_process_local_data(self._sharding, asked)
