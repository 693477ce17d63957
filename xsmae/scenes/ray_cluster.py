"""Embeddings of scenes on a Ray cluster: the side of the command.

Ray places the workers on the nodes, starts lost ones again, and moves the results. The
command gives each worker the next rows, writes what comes back in order, and gives rows
of a lost worker to another one: a node that never comes back holds up nothing.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from xsmae.errors import UserError, printable
from xsmae.scenes.ray_worker import Facts, Opening, Work, Worker
from xsmae.scenes.rows import Layout

if TYPE_CHECKING:
    from xsmae.scenes.rows import Stored

CALLS = 2  # of a worker at a time: one reads while the other one computes
AHEAD = 2  # results of a worker that wait for their turn to be written
BYTES = 16 * 2**20  # of a result, if it has several parts
LOSSES = 3  # workers that the same rows may lose
POLL = 0.2  # seconds
PATIENCE = 30.0  # seconds, for the head node and until a line says who is missing


class ClusterError(Exception):
    """No worker can compute; the message is one line for the user."""


def import_ray() -> Any:
    """The module ray, which reports nothing to its makers; UserError without it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--ray needs the package ray ({error}): pip install 'xsmae[ray]'"
        ) from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected; address: `auto`, `local`, or HOST:PORT of the head node."""
    ray = import_ray()
    if address not in ("auto", "local"):
        _check_reachable(address)
    options = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        options["include_dashboard"] = False
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray's own are of many kinds, Exception among them
        raise _unreachable(address, error) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has put its own there
                signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise UserError at once where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UserError(
            f"--ray={address}, expected auto, local or HOST:PORT of the head node; "
            "start the command on a node of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split()))[:200]
    return UserError(
        f"--ray={address}: Ray does not answer ({reason}): start it with `ray start "
        "--head`, or give --ray=local"
    )


@dataclasses.dataclass
class _Task:
    """Rows that wait for a worker, or are with one; losses: of workers."""

    work: Work
    future: concurrent.futures.Future
    losses: int = 0


class Cluster:
    """Workers of a Ray cluster, until the context ends.

    ray: from `connected`. count: of workers; None: one for each GPU of the cluster, or
    without GPUs one for each node. say: prints a line. options: of `Worker`.
    """

    def __init__(
        self, ray: Any, count: int | None, say: Callable[[str], None], **options: Any
    ):
        self._ray, self._say, self._options = ray, say, options
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        gpus = int(sum(node["Resources"].get("GPU", 0) for node in nodes))
        self.count = count or gpus or len(nodes)
        self._places = [node["NodeID"] for node in nodes] if not gpus else []
        self._todo: queue.PriorityQueue = queue.PriorityQueue()
        self._numbers = itertools.count()
        self.permits = threading.Semaphore(self.count * (CALLS + AHEAD))
        self._lock = threading.Lock()
        self._first: concurrent.futures.Future = concurrent.futures.Future()
        self._devices: set[str] = set()
        self._failed: str | None = None
        self._over = threading.Event()
        self._workers: list[Any] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Cluster:
        kind = self._ray.remote(Worker)
        for number in range(self.count):
            options = {"num_cpus": 1, "max_restarts": -1, "max_concurrency": CALLS}
            if self._places:
                place = self._places[number % len(self._places)]
                strategy = self._ray.util.scheduling_strategies
                options["scheduling_strategy"] = (
                    strategy.NodeAffinitySchedulingStrategy(place, soft=True)
                )
            else:
                options |= {"num_gpus": 1, "scheduling_strategy": "SPREAD"}
            worker = kind.options(**options).remote(**self._options)
            self._workers.append(worker)
            for _ in range(CALLS):
                thread = threading.Thread(
                    target=self._feed, args=(worker,), name="ray", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for worker in self._workers:
            self._ray.kill(worker)  # the calls that wait for it end
        for thread in self._threads:
            thread.join(10)

    def facts(self, should_stop: Callable[[], bool] = lambda: False) -> Facts:
        """Those of the workers, once the first one has loaded the encoder."""
        late = time.monotonic() + PATIENCE
        while not concurrent.futures.wait([self._first], POLL).done:
            self.check(should_stop)
            if time.monotonic() > late:
                self._say("no worker of Ray is there yet: `ray status` says why")
                late = math.inf
        return self._first.result()

    def submit(self, work: Work) -> concurrent.futures.Future:
        """Rows that the next free worker computes; earlier ones come first."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._todo.put((next(self._numbers), _Task(work, future)))
        return future

    def wait(
        self, future: concurrent.futures.Future, should_stop: Callable[[], bool]
    ) -> Any:
        """The result of a future; ClusterError if no worker will give it."""
        while not concurrent.futures.wait([future], POLL).done:
            self.check(should_stop)
        return future.result()

    def check(self, should_stop: Callable[[], bool]) -> None:
        """Raise KeyboardInterrupt if it shall stop, ClusterError if it cannot work."""
        if should_stop():
            raise KeyboardInterrupt
        if self._failed is not None:
            raise ClusterError(self._failed)

    def _feed(self, worker: Any) -> None:
        """Give a worker what it computes, one call after the other."""
        try:
            host = self._ready(worker)
            while host is not None and not self._over.is_set():
                try:
                    number, task = self._todo.get(timeout=POLL)
                except queue.Empty:
                    continue
                if not task.losses and not task.future.set_running_or_notify_cancel():
                    continue
                try:
                    task.future.set_result(self._call(worker.stored.remote(task.work)))
                except self._ray.exceptions.RayError as error:
                    self._lost(number, task, host, error)
                    host = self._ready(worker)
                except Exception as error:
                    task.future.set_exception(error)
        except Exception as error:
            self._fail(" ".join(str(error).split()) or type(error).__name__)

    def _call(self, reference: Any) -> Any:
        """The result of a call, or the worker's own error; RayError if it is lost."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise RuntimeError(str(error)) from None

    def _lost(self, number: int, task: _Task, host: str, error: Exception) -> None:
        if self._over.is_set():
            return
        task.losses += 1
        source, rows = task.work.opening.source, task.work.rows
        if task.losses >= LOSSES:
            reason = " ".join(str(error).split())[:200]
            message = (
                f"rows {rows.start} to {rows.stop - 1} of chips have lost {LOSSES} "
                f"workers, the last one on the node {host} ({reason}): lower "
                "--batch_size if memory was short"
            )
            task.future.set_exception(UserError(printable(message)))
            return
        self._say(f"{source}: a worker on the node {host} was lost, another one helps")
        self._todo.put((number, task))

    def _ready(self, worker: Any) -> str | None:
        """The node of a worker, once it is there (again); None if all is over."""
        errors = self._ray.exceptions
        while not self._over.is_set():
            try:
                facts = self._call(worker.facts.remote())
            except errors.ActorDiedError as error:  # Ray will not start it again
                if not self._over.is_set():
                    raise ClusterError(f"a worker of Ray ended: {error}") from None
            except errors.RayError:
                self._over.wait(POLL)
            except UserError as error:
                raise ClusterError(f"a worker of Ray: {error}") from None
            else:
                self._compare(facts)
                return facts.host
        return None

    def _compare(self, facts: Facts) -> None:
        with self._lock:
            if not self._first.done():
                self._first.set_result(facts)
            first = self._first.result()
            same = dataclasses.replace(facts, host=first.host, device=first.device)
            if same != first:
                raise ClusterError(
                    f"the nodes {first.host} and {facts.host} differ: "
                    f"{_described(first)}; {_described(facts)}; expected the same "
                    "software, kind of device and encoder on all"
                )
            self._devices.add(facts.device)
            if facts.device != first.device:
                kinds = " and ".join(sorted(self._devices))
                self._say(f"Ray's nodes have {kinds}: vectors may differ in last bits")

    def _fail(self, reason: str) -> None:
        if self._failed is None:
            self._failed = printable(reason)


def _described(facts: Facts) -> str:
    return (
        f"{facts.software}, {facts.device}, {facts.dtype}, groups of {facts.group}, "
        f"encoder {facts.digest}"
    )


@dataclasses.dataclass(frozen=True)
class OnRay:
    """Computes the rows of a scene on a cluster: a `Compute`."""

    cluster: Cluster
    opening: Opening
    size: int

    def stored(
        self,
        layout: Layout,
        job: str,
        rows: range,
        *,
        progress: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[tuple[range, Stored]]:
        """See `Compute`."""
        cluster, columns = self.cluster, layout.reader.grid.shape[1]
        todo = collections.deque(ranges(layout, rows, cluster.count))
        waiting: collections.deque = collections.deque()
        try:
            while todo or waiting:
                cluster.check(should_stop)
                while todo and cluster.permits.acquire(
                    timeout=None if waiting else POLL, blocking=not waiting
                ):
                    part = todo.popleft()
                    work = Work(self.opening, job, layout.step, part)
                    waiting.append(cluster.submit(work))
                if waiting:
                    found = cluster.wait(waiting[0], should_stop)
                    for part, stored in found:
                        yield part, stored
                    waiting.popleft()
                    cluster.permits.release()
                    progress(part.stop * columns)
        finally:
            for future in waiting:
                future.cancel()
                cluster.permits.release()


def ranges(layout: Layout, rows: range, workers: int) -> list[range]:
    """Cuts rows into ranges that workers compute, of whole parts of `layout.step`.

    They have at most `BYTES` where they have several parts, and there are some for each
    worker if there are enough parts.
    """
    step = layout.step
    row = sum(math.prod(shape) for shape in layout.shapes.values())
    high = layout.stored_row(min(rows.start + step, rows.stop))
    part = max(row * (high - layout.stored_row(rows.start)), 1)
    parts = -(-len(rows) // step)
    many = max(min(BYTES // part, parts // (workers * (CALLS + AHEAD))), 1) * step
    return [
        range(start, min(start + many, rows.stop))
        for start in range(rows.start, rows.stop, many)
    ]
