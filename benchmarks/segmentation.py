"""Pixels per second of segmentation, training and prediction, head by head.

    python -m benchmarks.segmentation [--encoder=random:tiny,patch_size=8] [--crop=512]

A training step gets a batch that is in memory: cut and normalised crops (`upernet`,
`upernet_trained`), or features that were computed before (`linear`). A prediction reads
an image of two crops per side in windows that share a quarter of the crop, as
`xsmae segment` does. It ends with the class of every pixel. Pixels of the image count
once. The heads take turns. The first call of each, which compiles, does not count. The
benchmark reports medians and the range over the rounds.

- `kflop/px`: the arithmetic by XLA's cost analysis of the program before optimization,
  with unrolled loops, since XLA counts the body of a loop once. Kernels that are
  compiled apart, such as cuDNN's attention, do not count. The exact kNN, which runs in
  float64, adds 2 x memory x width for each patch.
- `gflop/s`: that times the pixels per second.
- `peak GB`: the memory analysis of the compiled step: arguments, results and temporary
  arrays on the device. Prediction has none, since it runs several programs.

Prints one JSON line per head, then a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.input_pipeline import machine as machine_of_images
from xsmae.evaluation.evaluate import subject_of
from xsmae.evaluation.fitting.recipe import check, create_plan_of_steps
from xsmae.evaluation.segmentation.dense import last_tokens, normalizer
from xsmae.evaluation.segmentation.heads import recipe_of
from xsmae.evaluation.segmentation.windows import window_starts
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.evaluation.tasks.segment import create_learner, guesses
from xsmae.evaluation.tasks.segment_frozen import create_layer, retrieval

# Name -> head, and if the encoder stays as it is.
HEADS = {
    "linear": ("linear", True),
    "knn": ("knn", True),
    "upernet": ("upernet", True),
    "upernet_trained": ("upernet", False),
}
CLASSES = 6
CACHED = 4  # batches of features that the linear layer draws from
PER_SIDE = 2  # crops, of the predicted image
GSD = 0.5  # metres per pixel

Lower = Callable[[], jax.stages.Lowered]  # a program, before it is compiled


@dataclasses.dataclass
class Training:
    """A training, step by step.

    lower: its program, which gets `fixed`, the state, and what `batch()` returns.
    """

    lower: Lower
    fixed: tuple[Any, ...]
    state: Any
    batch: Callable[[], tuple[np.ndarray, ...]]
    compiled: jax.stages.Compiled | None = None

    def compile(self) -> float:
        """Compiles the step, and returns the GB that it takes at its peak."""
        self.compiled = self.lower().compile()
        found = self.compiled.memory_analysis()
        sides = found.argument_size_in_bytes + found.output_size_in_bytes
        return (sides + found.temp_size_in_bytes - found.alias_size_in_bytes) / 1e9

    def step(self) -> float:
        """The loss of one step."""
        self.state, loss = self.compiled(*self.fixed, self.state, *self.batch())
        return float(loss)


@dataclasses.dataclass(frozen=True)
class Work:
    """A head on an encoder, ready to run.

    training: None if nothing is trained. predict(images, gsd): see `segment.guesses`.
    predicts: the programs of one batch of windows. more: flop per pixel of a window in
    addition to theirs.
    """

    training: Training | None
    predict: Callable[[np.ndarray, np.ndarray], jax.Array]
    predicts: Sequence[Lower]
    more: float = 0.0


@dataclasses.dataclass(frozen=True)
class Image:
    """An image to predict: a `crops.Labelled`."""

    image: np.ndarray
    mask: np.ndarray
    gsd: float = GSD
    valid: None = None


def recipe_for(name: str, args: argparse.Namespace) -> Mapping[str, Any]:
    """The default recipe of a head with the sizes of the command line."""
    recipe = recipe_of(*HEADS[name])
    recipe.update(crop=args.crop, overlap=args.crop // 4, batch_size=args.batch_size)
    for field in ("dtype", "memory"):
        if field in recipe:
            recipe[field] = getattr(args, field)
    check(recipe)
    return recipe.to_dict()


def create_work(name: str, encoder: FrozenEncoder, recipe: Mapping[str, Any]) -> Work:
    """The head `name` with random weights, and random images."""
    rng, batch, crop = np.random.default_rng(0), recipe["batch_size"], recipe["crop"]
    bands = len(encoder.info["bands"])
    images = rng.normal(size=(batch, crop, crop, bands)).astype(np.float32)
    gsd = np.full((batch, 2), GSD, np.float32)
    if name in ("upernet", "upernet_trained"):
        masks = rng.integers(0, CLASSES, images.shape[:3], dtype=np.uint8)
        return _upernet(encoder, recipe, (images, gsd, masks), frozen=HEADS[name][1])
    dense = last_tokens(encoder)
    tokens = functools.partial(dense.func.lower, *dense.args, images, gsd)
    rows, columns = encoder.network.grid(crop, crop)
    width = encoder.network.embed_dim
    count = CACHED * batch
    if name == "knn":
        count = -(-recipe["memory"] // (rows * columns))
    features = rng.normal(size=(count, rows, columns, width)).astype(np.float16)
    masks = rng.integers(0, CLASSES, (count, crop, crop), dtype=np.uint8)
    if name == "linear":
        return _linear(dense, tokens, recipe, features, masks)
    numbers = {n: recipe[n] for n in ("k", "temperature", "memory")}
    predict = retrieval(dense, features, masks, CLASSES, seed=0, **numbers)
    search = 2 * recipe["memory"] * width / encoder.patch_size**2
    return Work(None, predict, [tokens], more=search)


def _linear(dense, tokens, recipe, features, masks) -> Work:
    plan, batch = create_plan_of_steps(recipe), recipe["batch_size"]
    layer = create_layer(features.shape[-1], CLASSES, plan, recipe=recipe, seed=0)
    rng, size = np.random.default_rng(0), masks.shape[1:3]

    def some() -> tuple[np.ndarray, np.ndarray]:
        rows = rng.permutation(len(features))[:batch]
        return features[rows], masks[rows]

    training = Training(
        functools.partial(layer.step.lower, layer.state, *some()), (), layer.state, some
    )
    scores = functools.partial(
        layer.scores.lower, layer.state, features[:batch].astype(np.float32), size=size
    )
    # Steps donate their state; predictions take as long with any other.
    kept = jax.tree.map(lambda x: x.copy(), layer.state)
    return Work(
        training,
        lambda images, gsd: layer.scores(kept, dense(images, gsd), size=size),
        [tokens, scores],
    )


def _upernet(encoder, recipe, batch, *, frozen) -> Work:
    learner = create_learner(
        encoder,
        CLASSES,
        create_plan_of_steps(recipe),
        recipe=recipe,
        frozen=frozen,
        seed=0,
    )
    state, step, predict = learner.state, learner.step, learner.predict
    kept = jax.tree.map(lambda x: x.copy(), state)
    training = Training(
        functools.partial(step.func.lower, *step.args, state, *batch),
        step.args,
        state,
        lambda: batch,
    )
    program = functools.partial(predict.func.lower, *predict.args, state, *batch[:2])
    return Work(training, functools.partial(predict, kept), [program])


def flops(programs: Sequence[Lower]) -> float:
    """The arithmetic of programs that were not traced before, by XLA's analysis."""
    unrolled = functools.partial(jax.lax.scan, unroll=True)
    with mock.patch.object(jax.lax, "scan", unrolled):
        return sum(program().cost_analysis()["flops"] for program in programs)


class Case:
    """A head whose training and prediction are measured.

    rates: pixels per second of each round.
    """

    def __init__(
        self, name: str, encoder: FrozenEncoder, recipe: Mapping[str, Any]
    ) -> None:
        self.name, self.recipe = name, recipe
        self.normalize = normalizer(encoder)
        crop, side = recipe["crop"], PER_SIDE * recipe["crop"]
        shape = (side, side, len(encoder.info["bands"]))
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.image = Image(values, np.zeros((side, side), np.uint8))
        windows = len(window_starts(side, crop, crop - recipe["overlap"])) ** 2
        # Counted on work of its own: programs that are traced stay as they are.
        work, pixels = (
            create_work(name, encoder, recipe),
            recipe["batch_size"] * crop**2,
        )
        predicting = flops(work.predicts) / pixels + work.more
        self.flops = {"predict": predicting * windows * crop**2 / side**2}
        self.pixels = {"predict": side**2}
        if work.training:
            self.flops["train"] = flops([work.training.lower]) / pixels
            self.pixels["train"] = pixels
        self.work = create_work(name, encoder, recipe)
        self.rates: dict[str, list[float]] = {name: [] for name in self.flops}
        self.peak_gb = None

    def compile(self) -> None:
        """The first call of each program."""
        if self.work.training:
            self.peak_gb = self.work.training.compile()
            self._train()
        self._predict()

    def turn(self) -> None:
        """One step, and one prediction."""
        for phase in self.rates:
            begin = time.perf_counter()
            self._train() if phase == "train" else self._predict()
            seconds = time.perf_counter() - begin
            self.rates[phase].append(self.pixels[phase] / seconds)

    def _train(self) -> None:
        loss = self.work.training.step()
        if not np.isfinite(loss):
            raise SystemExit(f"{self.name}: the loss is {loss}")

    def _predict(self) -> None:
        predicted = guesses(
            self.work.predict,
            [self.image],
            normalize=self.normalize,
            recipe=self.recipe,
        )
        rows = sum(len(guess.predicted) for guess in predicted)
        if rows != len(self.image.image):
            raise SystemExit(f"{self.name}: {rows} rows of {len(self.image.image)}")

    def summary(self) -> dict[str, Any]:
        """The measurements."""
        return {
            "head": self.name,
            "peak_gb": self.peak_gb,
            "load": round(os.getloadavg()[0], 1),
            **{
                phase: {
                    "pixels_per_second": statistics.median(rates),
                    "range": [min(rates), max(rates)],
                    "flop_per_pixel": self.flops[phase],
                }
                for phase, rates in self.rates.items()
            },
        }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The summary of each head; they take turns."""
    encoder = subject_of(args.encoder)
    cases = [Case(n, encoder, recipe_for(n, args)) for n in args.heads.split(",")]
    for case in cases:
        case.compile()
    for _ in range(args.rounds):
        for case in cases:
            case.turn()
    return [case.summary() for case in cases]


def machine() -> dict[str, str]:
    """The date, the processor, the device that computes, and versions."""
    return {**machine_of_images(), "computes": jax.devices()[0].device_kind}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| head | | Mpx/s | range | kflop/px | gflop/s | peak GB |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for result in results:
        for phase in ("train", "predict"):
            if phase not in result:
                continue
            found = result[phase]
            rate, flop = found["pixels_per_second"], found["flop_per_pixel"]
            low, high = (f"{1e-6 * end:.3g}" for end in found["range"])
            peak = f"{result['peak_gb']:.3g}" if phase == "train" else ""
            lines.append(
                f"| {result['head']} | {phase} | {1e-6 * rate:.3g} | {low} to {high} "
                f"| {1e-3 * flop:.4g} | {1e-9 * rate * flop:.3g} | {peak} |"
            )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="random:tiny,patch_size=8")
    parser.add_argument("--heads", default=",".join(HEADS), help="separated by commas")
    parser.add_argument("--crop", type=int, default=512, help="pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--memory", type=int, default=100_000, help="patches that knn compares with"
    )
    parser.add_argument(
        "--dtype", default="float32", help="of UperNet and its encoder: or bfloat16"
    )
    args = parser.parse_args(argv)
    unknown = set(args.heads.split(",")) - HEADS.keys()
    if unknown:
        parser.error(
            f"--heads={args.heads}, expected some of {', '.join(HEADS)}, separated by "
            "commas"
        )
    if args.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    return args


def main() -> None:
    """Measures what the flags say."""
    args = parse()
    print(json.dumps({**machine(), **vars(args)}), flush=True)
    results = measure(args)
    for result in results:
        print(json.dumps(result))
    print(table(results))


if __name__ == "__main__":
    main()
