"""One run of several processes, on one host or many: joining, and stopping together."""

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

# Seconds without a sign of life after which a process counts as ended: a quarter of the
# watchdog's time, within these. The longest is jax's own.
HEARTBEATS = (10, 100)


def join(values: flags.FlagValues, *, watchdog_minutes: float) -> None:
    """Make this one of the processes that the flags tell of, if they tell of any.

    Before any device is used. Raises UserError where the others are not found.
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
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def _check(values: flags.FlagValues) -> None:
    given = (values.coordinator, values.num_processes, values.process_id)
    host, _, port = (values.coordinator or "").rpartition(":")
    sound = None not in given and host and port.isdigit()
    if not sound or not 0 <= values.process_id < values.num_processes:
        raise UserError(
            f"--coordinator={given[0]} --num_processes={given[1]} --process_id="
            f"{given[2]}, expected HOST:PORT, a number and one from 0 below it"
        )


def own_folder(workdir: Path) -> Path:
    """Where this process writes what it alone has: of process 0 the workdir itself."""
    index = jax.process_index()
    return workdir / f"process_{index}" if index else workdir


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Of several processes, end at once where this one or another cannot go on.

    The others wait in an exchange for one that has ended; so does Python at its end,
    for minutes, for one that has not.
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
            f"an exchange with another process failed ({reason}): ending; the same "
            "commands go on from the newest checkpoint",
            EXIT_STATUS,
        )


def end_alone(error: UserError) -> None:
    """End this one of several processes, which alone cannot go on, at once.

    The others then end too. To save, and to close what all share, it would wait for
    them, who wait for it in the next step. One process alone returns.
    """
    if jax.distributed.is_initialized():
        _end(str(error), 2)


def _end(line: str, status: int) -> None:
    os.write(2, f"xsmae: {printable(line)}\n".encode())
    end_at_once(status)


def counted_together(ids: Collection[str], other: int) -> tuple[int, int]:
    """How many ids all processes have, each counted once, and the sum of their `other`.

    Every process asks at the same steps, and waits for the others.
    """
    if jax.process_count() == 1:
        return len(ids), other
    counts, others = multihost_utils.process_allgather(np.int32([len(ids), other])).T
    # Texts cannot be exchanged: 64 bits of their digests can.
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
    """Whether to stop after this step, the same for all processes at every step.

    One alone stops as soon as it is asked to. Of several each says at every step
    whether it was, and what they said is looked at a step later, so that nobody waits.
    signal: what was agreed upon, or None.
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
        """In the midst of a step or an evaluation: of several, never."""
        return self.signal is not None

    def after_step(self) -> bool:
        """Whether to stop now; every process asks after every step."""
        if self._several:
            said, self._said = self._said, self._largest(self._own())
            if said is not None:
                self._agreed = int(said) or None
        return self.signal is not None

    def after_all(self) -> bool:
        """As `after_step`, of what has been asked until now; the processes wait."""
        if self._several and self._agreed is None:
            asked = multihost_utils.process_allgather(np.int32(self._stop.signal or 0))
            self._agreed = int(asked.max()) or None
        return self.signal is not None

    def _own(self) -> jax.Array:
        asked = np.full(jax.local_device_count(), self._stop.signal or 0, np.int32)
        return jax.make_array_from_process_local_data(self._sharding, asked)
