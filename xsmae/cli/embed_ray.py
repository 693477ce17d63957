"""The part of `xsmae embed` that computes scenes on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
from absl import flags

from xsmae.errors import UserError
from xsmae.scenes.embed import Plan
from xsmae.scenes.ray_cluster import CALLS, Cluster, ClusterError, OnRay, connected
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    from xsmae.scenes.ray_worker import Opening
    from xsmae.scenes.rows import Compute

SCENES = 32  # at most, that are written at a time


def define_flags(values: flags.FlagValues) -> None:
    """The flags of Ray."""
    flags.DEFINE_string(
        "ray",
        None,
        "Compute on a Ray cluster (extra ray): auto, the one of this machine; local, a "
        "new one on this machine; or HOST:PORT of its head node.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "ray_workers",
        None,
        "How many workers, each with a GPU, or without GPUs spread over the nodes. "
        "Default: one for each GPU of the cluster, or without GPUs for each node.",
        flag_values=values,
        lower_bound=1,
    )


def check_flags(values: flags.FlagValues) -> None:
    """Raise UserError for flags that do not fit together."""
    if values.ray is None and values.ray_workers is not None:
        raise UserError("--ray_workers is for --ray: leave it out, or give --ray=auto")
    if values.ray is not None and values.shard is not None:
        raise UserError(
            "--shard with --ray, which divides the scenes itself: leave one of them out"
        )


@dataclasses.dataclass(frozen=True)
class Engine:
    """Who computes scenes: compute(opening) for each; `many` of them at a time."""

    encoder: Encoder
    compute: Callable[[Opening], Compute]
    many: int = 1

    def each(
        self,
        call: Callable[[Any, Callable[[], bool]], bool],
        items: Sequence[Any],
        should_stop: Callable[[], bool],
    ) -> list[bool]:
        """The results of call(item, should_stop); an exception stops the others."""
        if self.many == 1:
            return [call(item, should_stop) for item in items]
        over = threading.Event()

        def stop():
            return over.is_set() or should_stop()

        with concurrent.futures.ThreadPoolExecutor(self.many) as pool:
            futures = [pool.submit(call, item, stop) for item in items]
            try:
                ended = concurrent.futures.as_completed(futures)
                return [future.result() for future in ended]
            except BaseException:
                over.set()
                for future in futures:
                    future.cancel()
                raise


@contextlib.contextmanager
def engine(
    values: flags.FlagValues,
    load: Callable[..., Encoder],
    plan: Plan,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Iterator[Engine]:
    """Ray's workers; load: `load_encoder`."""
    # This process computes nothing, and must leave GPUs to the workers.
    jax.config.update("jax_platforms", "cpu")
    dtype = "float32" if values.precision == "auto" else values.precision
    with contextlib.ExitStack() as stack:
        try:
            # Before JAX has threads: Ray forks.
            ray = stack.enter_context(connected(values.ray))
            encoder = load(values.encoder, dtype=dtype, attention="auto")
            cluster = Cluster(
                ray,
                values.ray_workers,
                say,
                path=os.path.abspath(values.encoder),
                precision=values.precision,
                pooling=plan.of(encoder).pooling if values.unit == "chip" else None,
                batch_size=values.batch_size,
            )
            stack.enter_context(cluster)
            facts = cluster.facts(should_stop)
            if facts.dtype != dtype:
                encoder = load(values.encoder, dtype=facts.dtype, attention="auto")
            if facts.digest != encoder.digest:
                raise UserError(
                    f"{values.encoder} is {encoder.digest} here and {facts.digest} on "
                    f"the node {facts.host}: give a folder that all nodes share"
                )

            def compute(opening):
                return OnRay(cluster, opening, facts.group)

            many = min(cluster.count * CALLS, SCENES)
            say(f"Ray: {cluster.count} workers, the first one on {facts.host}")
            yield Engine(encoder, compute, many)
        except ClusterError as error:
            raise UserError(f"--ray={values.ray}: {error}") from None
