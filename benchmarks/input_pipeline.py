"""Images per second and core from JPEGs to two views, ours and the reference in turns.

    python -m benchmarks.input_pipeline [--folder=DIR] [--quality=90] [--train_steps=30]

Synthetic scenes are saved once into the folder. `ours` is the code of a training run: a
`FolderSource` and `LoadViews`. `reference` is the published transform (a random resized
crop, flips, then a bilinear random resized crop of that view) with Pillow: it decodes
and converts the whole image, cuts it and resizes the part. `whole` is ours with all
pixels decoded first, as evaluations read them. All produce uint8 arrays and draw areas
uniformly. The benchmark measures processor time, so other programs on the machine
disturb it little. It reports medians over the rounds, and the median of the rounds'
ratios. A short training with reader processes then measures the share of time spent
waiting for data. Prints one JSON line per case, then a table.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
import PIL
from ml_collections import ConfigDict
from PIL import Image, features
from xsmae.configs import folder as folder_config

from xsmae.data.folder import FolderSource
from xsmae.data.pipeline import LoadViews
from xsmae.data.records import BaseSource, Record
from xsmae.data.synthetic.source import Scene
from xsmae.data.views import ViewSampler
from xsmae.process.files import read_jsonl
from xsmae.train import train_and_evaluate

SCENES = {256: 64, 512: 16, 1024: 8, 2048: 4}  # side in pixels -> images
GSD = 0.5  # metres per pixel, about the GSD of fMoW's large images
SIZE = 128
AREA, AREA2, RATIO = (0.25, 1.0), (0.25, 0.75), (3 / 4, 4 / 3)


def save_scenes(root: pathlib.Path, side: int, quality: int) -> pathlib.Path:
    """The folder with scenes of one side; renders and saves missing ones."""
    folder = root / f"{side}px_quality{quality}"
    folder.mkdir(parents=True, exist_ok=True)
    half = side * GSD / 2
    for index in range(SCENES[side]):
        path = folder / f"{index:02}.jpg"
        if not path.exists():
            scene = Scene(seed=5, index=index, label=index % 10)
            pixels = scene.render(
                top=-half, left=-half, height=side, width=side, gsd=GSD
            )
            Image.fromarray(pixels).save(path, quality=quality)
    return folder


def reference(path: pathlib.Path, rng: random.Random) -> np.ndarray:
    """The published transform with Pillow only: uint8 [2, size, size, 3]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    view1 = _random_resized_crop(image, AREA, Image.Resampling.BICUBIC, rng)
    for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        if rng.random() < 0.5:
            view1 = view1.transpose(flip)
    view2 = _random_resized_crop(view1, AREA2, Image.Resampling.BILINEAR, rng)
    return np.stack([np.asarray(view1), np.asarray(view2)])


def _random_resized_crop(
    image: Image.Image,
    area: tuple[float, float],
    resample: Image.Resampling,
    rng: random.Random,
) -> Image.Image:
    box = (0, 0, *image.size)
    for _ in range(10):
        pixels = image.width * image.height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = (round(math.sqrt(pixels * a)) for a in (aspect, 1 / aspect))
        if width <= image.width and height <= image.height:
            left = rng.randint(0, image.width - width)
            top = rng.randint(0, image.height - height)
            box = (left, top, left + width, top + height)
            break
    return image.crop(box).resize((SIZE, SIZE), resample)


def create_loader(source: FolderSource, view2_from: str) -> LoadViews:
    """Our loader, with the reference's areas."""
    sampler = ViewSampler(
        num_views=2,
        size=SIZE,
        area=AREA,
        area2=AREA2,
        ratio=RATIO,
        area_distribution="uniform",
        view2_from=view2_from,
        view2_box="sample",
        interpolation="bicubic",
        interpolation2="bilinear" if view2_from == "view1" else "bicubic",
        horizontal_flip=0.5,
        vertical_flip=0.5,
    )
    return LoadViews(source, sampler, seed=0, batch_size=64, max_tries=1)


class Whole(BaseSource):
    """A source that decodes images before the boxes are drawn."""

    def __init__(self, source: FolderSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]


def measure_views(
    root: pathlib.Path, *, quality: int, rounds: int, seconds: float
) -> Iterator[dict]:
    """One case per side and source of view 2: images per second of processor time."""
    for side in SCENES:
        source = FolderSource(save_scenes(root, side, quality), gsd=GSD)
        paths = [source.path(i) for i in range(len(source))]
        rng = random.Random(0)
        for view2_from in ("source", "view1"):
            ours = create_loader(source, view2_from)
            whole = dataclasses.replace(ours, source=Whole(source))
            calls = {
                "reference": functools.partial(_reference_of, paths, rng),
                "whole": functools.partial(_load, whole),
                "ours": functools.partial(_load, ours),
            }
            rates = _in_turns(calls, rounds, seconds)
            ratios = ratios_of(rates["ours"], rates["reference"])
            size = statistics.mean(path.stat().st_size for path in paths)
            yield {
                "case": "views",
                "side": side,
                "quality": quality,
                "bytes_per_pixel": round(size / side**2, 3),
                "view2_from": view2_from,
                **{k: round(statistics.median(v), 1) for k, v in rates.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratio_quartiles": quartiles(ratios),
            }


def ratios_of(ours: list[float], others: list[float]) -> list[float]:
    """Ours / the other's, of each round."""
    return [a / b for a, b in zip(ours, others, strict=True)]


def quartiles(ratios: list[float]) -> list[float]:
    """The first and the third."""
    return [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]]


def _reference_of(paths: list[pathlib.Path], rng: random.Random, index: int) -> None:
    reference(paths[index % len(paths)], rng)


def _load(load: LoadViews, index: int) -> None:
    load(index, index)


def _in_turns(
    calls: dict[str, Callable], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Calls per second of processor time, one number per round, after a warm-up."""
    counts = {}
    for name, call in calls.items():
        call(0)
        counts[name] = max(1, round(seconds * rate(call, 4)))
    rates = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(rate(call, counts[name]))
    return rates


def rate(call: Callable[[int], object], count: int) -> float:
    """Calls per second of processor time; a call gets its number."""
    begin = time.process_time()
    for index in range(count):
        call(index)
    return count / (time.process_time() - begin)


def measure_training(
    root: pathlib.Path, *, quality: int, steps: int, workers: int
) -> dict:
    """A short run of Ti on the 256-px scenes; measures the share of waiting time."""
    data = {"root": str(save_scenes(root, 256, quality)), "gsd": GSD}
    config = folder_config.get_config("corrected,size=tiny")
    found = train(config, data, steps=steps, workers=workers)
    return {"case": "training", "side": 256, "quality": quality, **found}


def train(
    config: ConfigDict, data: dict[str, object], *, steps: int, workers: int
) -> dict:
    """A short run on `data`, its fields: images per second, shares of waiting time."""
    with tempfile.TemporaryDirectory() as workdir:
        config.update_from_flattened_dict(
            {
                **{f"data.{name}": value for name, value in data.items()},
                "batch_size": 64,
                "num_steps": steps,
                "optim.warmup_steps": 1,
                "log_every": 5,
                "model.dtype": "float32",
                "input.num_workers": workers,
                "knn.every": -1,
                "tensorboard": False,
            }
        )
        train_and_evaluate(config, pathlib.Path(workdir) / "run")
        rows = read_jsonl(pathlib.Path(workdir) / "run" / "metrics.jsonl")
    rows = [row for row in rows if row.get("images_per_second")]
    return {
        "workers": workers,
        "steps": steps,
        "images_per_second": round(
            statistics.median(row["images_per_second"] for row in rows), 1
        ),
        "waiting_for_data": [round(row["waiting_for_data"], 4) for row in rows],
    }


def machine() -> dict[str, str]:
    """The date, the processor and versions."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = f"{lines[0].partition(': ')[2]}, {len(lines)} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "device": cpu,
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        "numpy": np.__version__,
        "jax": jax.__version__,
        "grain": grain.__version__,
    }


def table(cases: list[dict]) -> str:
    """The cases as a Markdown table."""
    lines = [
        "| side | view 2 from | bytes/pixel | reference | whole | ours | ratio | half "
        "of the rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        if case["case"] == "views":
            low, high = case["ratio_quartiles"]
            lines.append(
                f"| {case['side']} | {case['view2_from']} | {case['bytes_per_pixel']} "
                f"| {case['reference']} | {case['whole']} | {case['ours']} "
                f"| {case['ratio']} | {low} to {high} |"
            )
    return "\n".join(lines)


def printed(cases: Iterator[dict]) -> list[dict]:
    """The cases; prints each once it is measured."""
    found = []
    for case in cases:
        found.append(case)
        print(json.dumps(case), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="for the scenes; default: a temporary one")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per side and round")
    parser.add_argument("--workers", type=int, default=2, help="reader processes")
    parser.add_argument("--train_steps", type=int, default=30, help="0: no training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(args.folder or temporary)
        print(json.dumps(machine()), flush=True)
        cases = printed(
            measure_views(
                root, quality=args.quality, rounds=args.rounds, seconds=args.seconds
            )
        )
        if args.train_steps:
            case = measure_training(
                root,
                quality=args.quality,
                steps=args.train_steps,
                workers=args.workers,
            )
            print(json.dumps(case), flush=True)
    print("\nImages per second of one core:\n")
    print(table(cases))


if __name__ == "__main__":
    main()
