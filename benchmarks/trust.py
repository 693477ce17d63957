"""Measures the cost of digests, lock and watchdog: `python -m benchmarks.trust`.

It runs the training step with background saves in one process, in turns with all of
them and with none, so that other load on the machine affects both. It prints a JSON
line: images/s of both (medians of the turns), the medians of the turns' ratios of wall
time and of processor time, and the same for the default `checkpoint.every`.

    --rounds=15     turns of each kind
    --every=25      steps per turn; each turn ends with a save
    --batch=64      samples per step
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from xsmae.configs import common

from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.saving import Saver
from xsmae.process.lock import FolderLock
from xsmae.process.watchdog import Watchdog
from xsmae.run.choices import INTERVALS
from xsmae.trainer import Trainer, batch_shapes, create_trainer

EVERY = INTERVALS["checkpoint.every"][-1]  # the default in a long run


def create(batch: int) -> tuple[Trainer, dict[str, np.ndarray], int]:
    """A small trainer like that of `quickstart.py`, a batch, the default `every`."""
    config = common.get_common("corrected", "tiny")
    config.views.size, config.model.patch_size = 64, 8
    config.model.dtype = "float32"
    config.batch_size, config.num_steps = batch, 100_000
    config.optim.warmup_steps = 10
    rng = np.random.default_rng(0)
    arrays = {
        name: np.zeros(shape.shape, bool)
        if shape.dtype == bool
        else rng.integers(1, 255, shape.shape).astype(shape.dtype)
        for name, shape in batch_shapes(config).items()
    }
    arrays["gsd"][:] = 1.0
    arrays["box"][:] = (0, 0, 64, 64)
    return create_trainer(config, num_images=batch), arrays, EVERY


@contextlib.contextmanager
def trusted(folder: Path) -> Iterator[tuple[Saver, Watchdog]]:
    """Saves with digests, lock and watchdog, as in a run."""
    dog = Watchdog(folder / "hang.log", minutes=30)
    with FolderLock(folder), dog.watching():
        checkpoints = Checkpoints(folder / "checkpoints")
        yield Saver(checkpoints, fingerprint="", allowed=0), dog
        checkpoints.close()


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[tuple[Saver, None]]:
    """Saves without any of them."""
    checkpoints = Checkpoints(folder / "checkpoints", with_digests=False)
    yield Saver(checkpoints, fingerprint="", allowed=0), None
    checkpoints.close()


def measure(rounds: int, every: int, batch: int) -> dict:
    """The measurements of one case."""
    trainer, arrays, default = create(batch)
    state = trainer.initial_state()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step, seconds = 0, {"trusted": [], "plain": []}
    used = {"trusted": [], "plain": []}
    for number in range(rounds + 1):
        # Alternate the order, since the second of a pair may find warm caches.
        for kind in (trusted, plain) if number % 2 else (plain, trusted):
            with tempfile.TemporaryDirectory() as folder, kind(Path(folder)) as own:
                saver, dog = own
                begin, cpu = time.perf_counter(), time.process_time()
                for _ in range(every):
                    state, metrics = trainer.step(state, arrays)
                    float(metrics["loss"])
                    step += 1
                    if dog is not None:
                        dog.feed()
                    saver.poll()
                saver.save(step, state)
                saver.finish()
                if number:  # the first round compiles
                    seconds[kind.__name__].append(time.perf_counter() - begin)
                    used[kind.__name__].append(time.process_time() - cpu)
    rates = {
        k: statistics.median(every * batch / s for s in v) for k, v in seconds.items()
    }
    pairs = [p / t for p, t in zip(seconds["plain"], seconds["trusted"], strict=True)]
    cpu = [p / t for p, t in zip(used["plain"], used["trusted"], strict=True)]
    ratio, cpu_ratio = statistics.median(pairs), statistics.median(cpu)

    def at_default(measured: float) -> float:
        return round(1 / (1 + (1 / measured - 1) * every / default), 5)

    return {
        "case": "trust",
        "state_mb": round(nbytes / 1e6, 1),
        "save_every": every,
        "rounds": rounds,
        "images_per_second": {k: round(v, 1) for k, v in rates.items()},
        "ratio": round(ratio, 4),
        "cpu_ratio": round(cpu_ratio, 4),
        f"ratio_saving_every_{default}": at_default(ratio),
        f"cpu_ratio_saving_every_{default}": at_default(cpu_ratio),
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rounds", 15), ("every", 25), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.every, options.batch)))


if __name__ == "__main__":
    main()
