"""Compares our training step with PyTorch's: `python -m benchmarks.train_step`.

The implementations of a group run in separate processes at the same time. They step in
turns on the same cores or GPU, so that other load on the machine affects all of them.
Prints one JSON line per group, and a table: samples/s (two views each), the ratio of
the first one's median to the others', peak memory (resident, or used on the GPU), and
the seconds until the first step was done (compilation).

    --groups=ours-float32:torch-float32,...   the groups; default: those of the table
    --rounds=7 --steps=1                      turns, and steps per turn
    --together                                compile at the same time, on many cores

On a GPU: --case=base_512 --case=large_256 --steps=10
--groups=ours-bfloat16-pallas:ours-bfloat16-cudnn:ours-bfloat16-xla:torch-bfloat16

Ours is `ours-DTYPE-ATTENTION-REMAT-BLOCKS`; missing parts default to the presets.

Needs torch and transformers in addition to xsmae (`make test-peers` installs them). All
processes use the malloc of this command: set LD_PRELOAD or GLIBC_TUNABLES as in the
README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np

# Case -> size, pixels, patch size, samples per step.
CASES = {
    "tiny_128": ("tiny", 128, 16, 64),
    "base_128": ("base", 128, 16, 64),
    "tiny_64": ("tiny", 64, 8, 256),
    "base_512": ("base", 128, 16, 512),  # for a GPU, like the next
    "large_256": ("large", 128, 16, 256),
}
ON_A_CPU = ("tiny_128", "base_128", "tiny_64")
DTYPES = ("float32", "bfloat16")
PEERS = tuple(f"{kind}-{d}" for d in DTYPES for kind in ("torch", "torch_compile"))
ATTENTION = ("pallas", "cudnn", "xla")
REMAT = ("none", "elementwise", "dots", "full")
OURS = tuple(f"ours-{dtype}" for dtype in DTYPES)
WITH = tuple(f"ours-bfloat16-{x}" for x in ATTENTION)
WITH += ("ours-float32-pallas", "ours-float32-xla")  # cuDNN has 16-bit kernels only
KEEPING = tuple(f"{ours}-{x}" for ours in WITH for x in REMAT)
KEEPING += tuple(f"{ours}-{x}" for ours in KEEPING for x in ("scanned", "unrolled"))
IMPLEMENTATIONS = (*OURS, *WITH, *KEEPING, *PEERS)
# Ours in each dtype against the peers that it must match in speed.
GROUPS = tuple(f"ours-float32:{peer}" for peer in PEERS if "float32" in peer) + tuple(
    f"ours-bfloat16:{peer}" for peer in PEERS
)
LEARNING_RATE, WEIGHT_DECAY, BETAS, TEMPERATURE = 1e-4, 0.05, (0.9, 0.95), 0.5
CHANNELS = 3


Step = Callable[[], Callable[[], float]]  # starts a step; its result waits for the loss


def our_config(
    case: str,
    dtype: str,
    attention: str = "auto",
    remat: str = "",
    blocks: str = "",
):
    """The `published` method with the same blocks as Hugging Face's MAE."""
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
        attention=attention,
        norm_style="pre",
        norm_epsilon=1e-6,
        encoder_norm=True,
    )
    if remat:
        config.model.remat = remat
    if blocks:
        config.model.scan = blocks == "scanned"
    loss = config.loss
    loss.reconstruction.update(norm_pix_loss=True, views="mean")
    loss.contrastive.update(temperature=TEMPERATURE, positive_in_denominator=True)
    loss.cross_prediction.stop_gradient = True
    return config


def our_step(case: str, *options: str) -> tuple[Step, Callable[[], int]]:
    """One update of ours from a batch in memory, and its peak memory (bytes).

    `options` are the arguments of `our_config` after the case.
    """
    import jax

    from xsmae.sharding import by_batch, put_batch
    from xsmae.trainer import batch_shapes, create_trainer

    config = our_config(case, *options)
    trainer = create_trainer(config, num_images=config.batch_size)
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
    image = shapes["image"]
    batch["image"] = rng.integers(0, 256, image.shape, dtype=np.uint8)
    batch["box"] = np.broadcast_to(np.float32([0, 0, 1, 1]), shapes["box"].shape)
    batch = put_batch(batch, by_batch(trainer.mesh))
    state = [trainer.initial_state()]

    def step() -> Callable[[], float]:
        state[0], metrics = trainer.step(state[0], batch)
        return lambda: float(metrics["loss"])

    device = jax.devices()[0]
    if device.platform != "gpu":
        return step, resident
    return step, lambda: device.memory_stats()["peak_bytes_in_use"]


def torch_step(
    case: str, dtype: str, *, compiled: bool
) -> tuple[Step, Callable[[], int]]:
    """One update of the peer from a batch in memory, and its peak memory (bytes)."""
    import torch

    from benchmarks import torch_step as peer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, like XLA
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
        device=device,
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2 * batch, CHANNELS, pixels, pixels)).astype(np.float32)
    images = torch.from_numpy(images).to(device)
    peak = resident if device == "cpu" else torch.cuda.max_memory_allocated
    return lambda: update(images).item, peak


def resident() -> int:
    """The peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def create_step(case: str, implementation: str) -> tuple[Step, Callable[[], int]]:
    """The step of one of `IMPLEMENTATIONS`, and a function for peak memory (bytes)."""
    kind, dtype, *options = implementation.split("-")
    if kind == "ours":
        return our_step(case, dtype, *options)
    return torch_step(case, dtype, compiled=kind == "torch_compile")


def serve(case: str, implementation: str) -> None:
    """Runs a child: one step, then as many steps as each line of stdin says."""
    start = time.monotonic()
    step, peak = create_step(case, implementation)
    loss = step()()
    _answer(first=time.monotonic() - start, loss=loss)
    for line in sys.stdin:
        start = time.monotonic()
        for _ in range(int(line)):
            wait = step()
        loss = wait()
        seconds = time.monotonic() - start
        _answer(seconds=seconds, loss=loss, peak=peak())


def _answer(**values: float) -> None:
    print(f"\n{json.dumps(values)}", flush=True)


@dataclasses.dataclass
class Child:
    """An implementation in its own process."""

    implementation: str
    process: subprocess.Popen
    first: float = 0.0
    rates: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    @classmethod
    def start(cls, case: str, implementation: str, share: float) -> Child:
        """Starts it with a share of the GPU's memory; `first_step` waits for it."""
        command = [sys.executable, "-m", "benchmarks.train_step"]
        command += [f"--case={case}", f"--child={implementation}"]
        pipe = subprocess.PIPE
        child = cls(
            implementation,
            subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                text=True,
                # XLA takes its share of the GPU's memory at once. With several
                # processes, growing pools would grow beyond their need.
                env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"},
            ),
        )
        return child

    def first_step(self) -> None:
        """Waits for the first step and records its time."""
        self.first = self.read()["first"]

    def read(self) -> dict:
        """Its next answer; skips other output."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.implementation} ended with {self.process.wait()}")

    def run(self, steps: int, batch: int) -> None:
        """Runs one turn."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.read()
        if not np.isfinite(answer["loss"]):
            raise SystemExit(f"{self.implementation}: the loss is {answer['loss']}")
        self.rates.append(steps * batch / answer["seconds"])
        self.peak = answer["peak"]

    def summary(self) -> dict:
        """The measurements."""
        return {
            "implementation": self.implementation,
            "samples_per_second": statistics.median(self.rates),
            "all": self.rates,
            "peak_gb": self.peak / 1e9,
            "until_first_step_seconds": self.first,
        }


def compare(
    case: str, group: str, *, rounds: int, steps: int, together: bool = False
) -> dict:
    """Measures a group in turns; `together` compiles all at the same time."""
    batch, names = CASES[case][-1], group.split(":")
    children = []
    try:
        for name in names:
            children.append(Child.start(case, name, 0.9 / len(names)))
            if not together:
                children[-1].first_step()
        for child in children if together else ():
            child.first_step()
        for child in children:
            child.run(1, batch)
            child.rates.clear()  # the second step still includes some set-up
        for _ in range(rounds):
            for child in children:
                child.run(steps, batch)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    first, *others = (child.summary() for child in children)
    for other in others:
        other["ratio"] = first["samples_per_second"] / other["samples_per_second"]
        other["memory_ratio"] = first["peak_gb"] / other["peak_gb"]
    return {"case": case, "group": [first, *others]}


def machine() -> dict[str, str | int]:
    """The hardware and the versions."""
    names = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            names[key.strip()] = value.strip()
    flags = names.get("flags", "").split()
    with open("/proc/self/maps") as file:
        loaded = file.read()
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": ", ".join(f for f in ("amx_bf16", "avx512_bf16") if f in flags),
        "malloc": "tcmalloc" if "tcmalloc" in loaded else "glibc",
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    for name in ("jax", "flax", "torch", "transformers"):
        found[name] = version(name)
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        found["gpu"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
    return found


def table(results: Sequence[dict]) -> str:
    """A Markdown table, one line per implementation; ratio = group's first / this."""
    header = (
        "case", "implementation", "samples/s", "ratio", "peak GB", "first step s"
    )  # fmt: skip
    lines = [header, ["---"] * 2 + ["---:"] * 4]
    for result in results:
        for one in result["group"]:
            lines.append(
                (
                    result["case"],
                    one["implementation"],
                    f"{one['samples_per_second']:.1f}",
                    f"{one['ratio']:.2f}" if "ratio" in one else "",
                    f"{one['peak_gb']:.2f}",
                    f"{one['until_first_step_seconds']:.0f}",
                )
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the groups that the flags name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.case[0], args.child)
        return
    if min(args.steps, args.rounds) < 1:
        parser.error("--steps and --rounds: expected 1 or more")
    groups = args.groups.split(",")
    for group in groups:
        if len(group.split(":")) < 2 or set(group.split(":")) - set(IMPLEMENTATIONS):
            parser.error(
                f"--groups={group}, expected two or more of "
                f"{', '.join((*OURS, *WITH, *PEERS))}, separated by colons; the "
                f"attention may be followed by -{', -'.join(REMAT)}, and that by "
                "-scanned or -unrolled"
            )
    print(json.dumps(machine()), flush=True)
    results = []
    for case in args.case or ON_A_CPU:
        for group in groups:
            result = compare(
                case,
                group,
                rounds=args.rounds,
                steps=args.steps,
                together=args.together,
            )
            results.append(result)
            print(json.dumps(result), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
