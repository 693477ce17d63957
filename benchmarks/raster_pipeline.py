"""Windows per second and core from a large raster, ours and an open per sample.

    python -m benchmarks.raster_pipeline [--dir=DIR] [--side=20000] [--train_steps=30]

The script writes two rasters of 4 bands of 16 bits, compressed with deflate: one in
blocks of 512 px, one in strips of one row. They repeat 5,000 px: 2,000 px of a
synthetic scene, side by side, with noise over all. deflate looks back 32 KB, 4,096 px
of a row, so it finds no repetition. Without --dir they are in a temporary folder (5
GB). All windows have 256 px:

- `opened`: `rasterio.open` and one windowed read per sample at a random place, float32.
- `opened_same`: the same for windows that ours has.
- `alone`: our source with `crops_per_read=1`: no window shares a read.
- `ours`: our source in the order of training, values in float32 and validity.
- `views`: ours, with two views of 128 px of each window.

They take turns. The benchmark measures processor time of one thread, so other programs
on the machine disturb it little; the files are in the page cache. It reports medians
over the rounds, and the median of the rounds' ratios of `ours` and `opened`. A short
training with reader processes then measures the share of time spent waiting for data,
and the peak memory of the readers. Prints one JSON line per case, then a table.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import rasterio
from rasterio.windows import Window
from xsmae.configs import geotiff as geotiff_config

from benchmarks import input_pipeline
from benchmarks.input_pipeline import printed, quartiles, rate, ratios_of
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.order import shuffled
from xsmae.data.raster_kept import windows_here
from xsmae.data.synthetic.source import Scene

RENDERED, REPEATED = 2000, 5000  # pixels of the sides
WINDOW = 256
SCALE, OFFSET = 1e-4, -0.1  # as Sentinel-2 has them since baseline 04.00
LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 512, "blockysize": 512},
    "striped": {"blockysize": 1},
}
# Windows in a round. Ours are of several whole groups, with and without strips.
COUNTS = {"ours": 64, "alone": 16, "opened": 16, "opened_same": 16, "views": 64}


def scene(side: int) -> np.ndarray:
    """uint16 [4, side, side]: a synthetic scene in numbers like Sentinel-2's."""
    half = RENDERED * 2.0 / 2
    rendered = Scene(seed=5, index=0, label=3).render(
        top=-half, left=-half, height=RENDERED, width=RENDERED, gsd=2.0
    )
    red, green, blue = np.moveaxis(rendered.astype(np.float32), -1, 0)
    rng, places = np.random.default_rng(0), np.arange(side) % RENDERED
    found = np.empty((4, side, side), np.uint16)
    for band, land in zip(
        found, (red, green, blue, 1.3 * green - 0.3 * red), strict=True
    ):
        noise = rng.standard_normal((side, side), np.float32)
        repeated = land[places][:, places]
        band[...] = np.clip(1000 + 11 * repeated + 8 * noise, 0, 10_000)
    return found


def write_rasters(folder: pathlib.Path, side: int) -> dict[str, pathlib.Path]:
    """The raster of each layout; writes those that are missing."""
    paths = {name: folder / name / f"{side}.tif" for name in LAYOUTS}
    missing = [name for name, path in paths.items() if not path.exists()]
    block = scene(min(REPEATED, side)) if missing else None
    for name in missing:
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        written = paths[name].with_suffix(".part")
        with rasterio.open(
            written,
            "w",
            driver="GTiff",
            height=side,
            width=side,
            count=4,
            dtype="uint16",
            crs="EPSG:32633",
            transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
            compress="deflate",
            predictor=2,
            photometric="minisblack",
            num_threads=os.cpu_count(),
            bigtiff="if_safer",
            **LAYOUTS[name],
        ) as raster:
            columns = np.arange(side) % block.shape[2]
            for top in range(0, side, 512):
                rows = np.arange(top, min(top + 512, side)) % block.shape[1]
                part = block[:, rows][:, :, columns]
                raster.write(part, window=Window(0, top, side, len(rows)))
        written.rename(paths[name])
        row = {
            "case": "written",
            "layout": name,
            "side": side,
            "gb": round(paths[name].stat().st_size / 1e9, 2),
            "raw_gb": round(8 * side**2 / 1e9, 2),
            "seconds": round(time.monotonic() - begin, 1),
        }
        print(json.dumps(row), flush=True)
    return paths


class Calls:
    """Each call reads the next window in one of the ways of the module."""

    def __init__(self, path: pathlib.Path, side: int):
        options = {"window": WINDOW, "scale": SCALE, "offset": OFFSET}
        self.path, self.side = path, side
        self.source = GeotiffSource(path, **options)
        self.alone = GeotiffSource(path, **options, crops_per_read=1)
        self.load = input_pipeline.create_loader(self.source, "source")
        self.order = shuffled(self.source, seed=0, epochs=1)
        self.alone_order = shuffled(self.alone, seed=0, epochs=1)
        self.rng = np.random.default_rng(0)
        # The ways that share blocks begin at places of their own.
        self.places = dict.fromkeys(COUNTS, 0) | {"views": len(self.source) // 2}

    def call(self, name: str, number: int = 0) -> None:
        """Read the next window of one way; the number of the call changes nothing."""
        del number
        place = self.places[name]
        self.places[name] = (place + 1) % len(self.source)
        if name == "views":
            self.load(place, self.order[place])
        elif name == "opened":
            top, left = self.rng.integers(0, self.side - WINDOW + 1, 2)
            self._open(int(top), int(left), WINDOW, WINDOW)
        else:
            source = self.source if name == "ours" else self.alone
            order = self.order if name == "ours" else self.alone_order
            with source.open(order[place]) as record:
                if name == "opened_same":
                    self._open(*record.image.window)
                else:
                    record.image.read()

    def _open(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        with rasterio.open(self.path) as raster:
            numbers = raster.read(window=Window(left, top, width, height))
        return numbers.astype(np.float32) * np.float32(SCALE) + np.float32(OFFSET)


def measure_reading(
    paths: dict[str, pathlib.Path], *, side: int, rounds: int
) -> Iterator[dict]:
    """One case per layout: windows per second of processor time."""
    for layout, path in paths.items():
        calls = Calls(path, side)
        rates = {name: [] for name in COUNTS}
        for way in COUNTS:
            calls.call(way)  # opens and imports what is opened and imported once
        windows_here().forget(str(path))
        calls.places |= {"ours": 0, "views": _first_of_a_group(calls)}
        for _ in range(rounds):
            for name, count in COUNTS.items():
                rates[name].append(rate(functools.partial(calls.call, name), count))
        ratios = {
            name: ratios_of(rates["ours"], rates[name])
            for name in ("opened", "opened_same", "alone")
        }
        yield {
            "case": "windows",
            "layout": layout,
            "side": side,
            "bytes_per_number": round(path.stat().st_size / (4 * side**2), 2),
            **{k: round(statistics.median(v), 1) for k, v in rates.items()},
            **{f"ratio_{k}": round(statistics.median(v), 2) for k, v in ratios.items()},
            "ratio_quartiles": quartiles(ratios["opened"]),
            "load": round(os.getloadavg()[0], 1),
        }


def _first_of_a_group(calls: Calls) -> int:
    """A place in the second half of the order where a group begins."""
    groups, place = calls.source.groups, len(calls.source) // 2
    while groups[calls.order[place]] == groups[calls.order[place - 1]]:
        place += 1
    return place


@contextlib.contextmanager
def peaks_of_readers() -> Iterator[dict[int, float]]:
    """Process id -> peak resident MB of each reader process, filled meanwhile."""
    found: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for process in multiprocessing.active_children():
                with contextlib.suppress(OSError):
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                    for line in status.splitlines():
                        if line.startswith("VmHWM:"):
                            found[process.pid] = int(line.split()[1]) * 1024 / 1e6

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure_training(
    path: pathlib.Path, *, layout: str, side: int, steps: int, workers: int
) -> dict:
    """A short run of Ti: the share of waiting time, and the readers' peak memory."""
    config = geotiff_config.get_config("corrected,size=tiny")
    data = {"root": str(path), "scale": SCALE, "offset": OFFSET}
    with peaks_of_readers() as peaks:
        found = input_pipeline.train(config, data, steps=steps, workers=workers)
    return {
        "case": "training",
        "layout": layout,
        "side": side,
        **found,
        "reader_peak_mb": sorted(round(peak) for peak in peaks.values()),
        "load": round(os.getloadavg()[0], 1),
    }


def machine() -> dict[str, str]:
    """The date, the processor and versions."""
    gdal = {"rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__}
    return {**input_pipeline.machine(), **gdal}


def table(cases: list[dict]) -> str:
    """The cases as a Markdown table."""
    lines = [
        "| scene | opened | opened_same | alone | ours | views | ours / opened | half "
        "of the rounds | ours / opened_same |",
        "|---|" + "---:|" * 5 + "---|---|---|",
    ]
    for case in cases:
        if case["case"] == "windows":
            low, high = case["ratio_quartiles"]
            lines.append(
                f"| {case['layout']} | {case['opened']} | {case['opened_same']} "
                f"| {case['alone']} | {case['ours']} | {case['views']} "
                f"| {case['ratio_opened']} | {low} to {high} "
                f"| {case['ratio_opened_same']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="for the rasters; default: a temporary folder")
    parser.add_argument("--side", type=int, default=20_000, help="pixels of a raster")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2, help="reader processes")
    parser.add_argument("--train_steps", type=int, default=30, help="0: no training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(machine()), flush=True)
        paths = write_rasters(pathlib.Path(args.dir or temporary), args.side)
        cases = printed(measure_reading(paths, side=args.side, rounds=args.rounds))
        for layout, path in paths.items() if args.train_steps else ():
            case = measure_training(
                path,
                layout=layout,
                side=args.side,
                steps=args.train_steps,
                workers=args.workers,
            )
            print(json.dumps(case), flush=True)
    print("\nWindows per second of one core:\n")
    print(table(cases))


if __name__ == "__main__":
    main()
