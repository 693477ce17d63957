"""Our training step against PyTorch's: `python -m benchmarks.train_step`.

Each pair of implementations runs in two processes that are alive together and step in
turns on the same cores, so that what else the machine does meets both alike. A JSON
line a pair, and a table: samples/s (two views each), the ratio of the medians, peak
resident memory, and the seconds until the first step was done (compilation).

    --pairs=ours-float32:torch-float32,...   which; default: those of the table
    --rounds=7 --steps=1                     turns, and steps in a turn

Needs torch and transformers beside xsmae (`make test-peers` installs them). Give both
sides the malloc settings of the README by setting GLIBC_TUNABLES for the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np

# Case -> size, pixels, patch size, samples a step.
CASES = {
    "tiny_128": ("tiny", 128, 16, 64),
    "base_128": ("base", 128, 16, 64),
    "tiny_64": ("tiny", 64, 8, 256),
}
DTYPES = ("float32", "bfloat16")
PEERS = tuple(f"{kind}-{d}" for d in DTYPES for kind in ("torch", "torch_compile"))
IMPLEMENTATIONS = tuple(f"ours-{dtype}" for dtype in DTYPES) + PEERS
# Ours in each dtype against the peers that the issue of speed is decided by.
PAIRS = tuple(f"ours-float32:{peer}" for peer in PEERS if "float32" in peer) + tuple(
    f"ours-bfloat16:{peer}" for peer in PEERS
)
LEARNING_RATE, WEIGHT_DECAY, BETAS, TEMPERATURE = 1e-4, 0.05, (0.9, 0.95), 0.5
CHANNELS = 3


def our_config(case: str, dtype: str):
    """The `published` method on the blocks that Hugging Face's MAE has."""
    from xsmae.configs import common

    size, pixels, patch, batch = CASES[case]
    config = common.get_common("published", size, "cross_scale_mae")
    config.views.size, config.batch_size, config.num_steps = pixels, batch, 1000
    config.optim.warmup_steps = 10
    config.optim.learning_rate = LEARNING_RATE
    config.optim.learning_rate_batch = batch
    config.model.update(
        patch_size=patch,
        dtype=dtype,
        norm_style="pre",
        norm_epsilon=1e-6,
        encoder_norm=True,
    )
    loss = config.loss
    loss.reconstruction.update(norm_pix_loss=True, views="mean")
    loss.contrastive.update(temperature=TEMPERATURE, positive_in_denominator=True)
    loss.cross_prediction.stop_gradient = True
    return config


def our_step(case: str, dtype: str) -> Callable[[], float]:
    """One update of ours, from a batch in memory."""
    import jax

    from xsmae.trainer import batch_shapes, create_trainer

    config = our_config(case, dtype)
    trainer = create_trainer(config, num_images=config.batch_size)
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
    image = shapes["image"]
    batch["image"] = rng.integers(0, 256, image.shape, dtype=np.uint8)
    batch["box"] = np.broadcast_to(np.float32([0, 0, 1, 1]), shapes["box"].shape)
    state = [trainer.initial_state()]

    def step() -> float:
        state[0], metrics = trainer.step(state[0], batch)
        return float(jax.block_until_ready(metrics["loss"]))

    return step


def torch_step(case: str, dtype: str, *, compiled: bool) -> Callable[[], float]:
    """One update of the peer, from a batch in memory."""
    import torch

    from benchmarks import torch_step as peer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    _, pixels, _, batch = CASES[case]
    update = peer.create_step(
        our_config(case, dtype).model.to_dict(),
        size=pixels,
        channels=CHANNELS,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        dtype=dtype,
        compiled=compiled,
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2 * batch, CHANNELS, pixels, pixels)).astype(np.float32)
    images = torch.from_numpy(images)
    return lambda: update(images)


def create_step(case: str, implementation: str) -> Callable[[], float]:
    """The step of one of `IMPLEMENTATIONS`."""
    kind, dtype = implementation.split("-")
    if kind == "ours":
        return our_step(case, dtype)
    return torch_step(case, dtype, compiled=kind == "torch_compile")


def serve(case: str, implementation: str) -> None:
    """A child: a first step, and then as many as each line of stdin says."""
    start = time.monotonic()
    step = create_step(case, implementation)
    loss = step()
    _answer(first=time.monotonic() - start, loss=loss)
    for line in sys.stdin:
        start = time.monotonic()
        for _ in range(int(line)):
            loss = step()
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _answer(seconds=seconds, loss=loss, peak=peak)


def _answer(**values: float) -> None:
    print(f"\n{json.dumps(values)}", flush=True)


@dataclasses.dataclass
class Child:
    """An implementation in a process of its own."""

    implementation: str
    process: subprocess.Popen
    first: float = 0.0
    rates: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    @classmethod
    def start(cls, case: str, implementation: str) -> Child:
        """Start it, and wait until its first step is done."""
        command = [sys.executable, "-m", "benchmarks.train_step"]
        command += [f"--case={case}", f"--child={implementation}"]
        pipe = subprocess.PIPE
        child = cls(
            implementation,
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True),
        )
        child.first = child.read()["first"]
        return child

    def read(self) -> dict:
        """What it answers next; what else it prints is passed over."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.implementation} ended with {self.process.wait()}")

    def run(self, steps: int, batch: int) -> None:
        """A turn."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.read()
        if not np.isfinite(answer["loss"]):
            raise SystemExit(f"{self.implementation}: the loss is {answer['loss']}")
        self.rates.append(steps * batch / answer["seconds"])
        self.peak = answer["peak"]

    def summary(self) -> dict:
        """What was measured of it."""
        return {
            "implementation": self.implementation,
            "samples_per_second": statistics.median(self.rates),
            "all": self.rates,
            "peak_gb": self.peak / 1e9,
            "until_first_step_seconds": self.first,
        }


def compare(case: str, pair: str, *, rounds: int, steps: int) -> dict:
    """The two of a pair, in turns."""
    batch = CASES[case][-1]
    children = [Child.start(case, name) for name in pair.split(":")]
    try:
        for child in children:
            child.run(1, batch)
            child.rates.clear()  # what is still set up in the second step
        for _ in range(rounds):
            for child in children:
                child.run(steps, batch)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    ours, theirs = (child.summary() for child in children)
    ratio = ours["samples_per_second"] / theirs["samples_per_second"]
    memory = ours["peak_gb"] / theirs["peak_gb"]
    return {
        "case": case,
        "ratio": ratio,
        "memory_ratio": memory,
        "pair": [ours, theirs],
    }


def machine() -> dict[str, str | int]:
    """What it was measured on, and with."""
    names = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            names[key.strip()] = value.strip()
    flags = names.get("flags", "").split()
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": ", ".join(f for f in ("amx_bf16", "avx512_bf16") if f in flags),
        "malloc": os.environ.get("GLIBC_TUNABLES", "glibc's defaults"),
    }
    for name in ("jax", "flax", "torch", "transformers"):
        found[name] = version(name)
    return found


def table(results: Sequence[dict]) -> str:
    """Markdown, a line a pair."""
    header = (
        "case", "ours", "peer", "ours, samples/s", "peer's", "ratio",
        "peak GB", "peer's", "first step s", "peer's",
    )  # fmt: skip
    lines = [header, ["---"] * 3 + ["---:"] * 7]
    for result in results:
        ours, theirs = result["pair"]
        numbers = [
            f"{one[name]:.{digits}f}"
            for name, digits in (
                ("samples_per_second", 1),
                ("peak_gb", 2),
                ("until_first_step_seconds", 0),
            )
            for one in (ours, theirs)
        ]
        numbers.insert(2, f"{result['ratio']:.2f}")
        names = [one["implementation"] for one in (ours, theirs)]
        lines.append([result["case"], *names, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the pairs that the flags name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.case[0], args.child)
        return
    pairs = args.pairs.split(",")
    for pair in pairs:
        if len(pair.split(":")) != 2 or set(pair.split(":")) - set(IMPLEMENTATIONS):
            parser.error(
                f"--pairs={pair}, expected two of {', '.join(IMPLEMENTATIONS)} with a "
                "colon between them"
            )
    print(json.dumps(machine()), flush=True)
    results = []
    for case in args.case or CASES:
        for pair in pairs:
            result = compare(case, pair, rounds=args.rounds, steps=args.steps)
            results.append(result)
            print(json.dumps(result), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
