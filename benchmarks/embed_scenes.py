"""Chips per second of `xsmae embed` on a scene, beside the encoder's own rate.

    python -m benchmarks.embed_scenes [--size=small] [--rows=12] [--rounds=5]

Writes a scene of 16 bits and four bands in tiles, chips of 224 pixels side by side, and
embeds it with random weights. The encoder's own rate is that of the same groups of
chips from memory, without reading, normalising by the scene's units, and writing. The
two take turns. The first turn, which compiles, does not count.

Prints one JSON line per round, then a table of medians. `ratio`: the median over the
rounds of the rate of `embed` in parts of the encoder's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from xsmae.configs import common

from benchmarks.input_pipeline import machine
from xsmae.bands import Bands
from xsmae.data.raster import open_raster
from xsmae.scenes.chips import Length
from xsmae.scenes.embed import Chips, Plan, embed_scene
from xsmae.scenes.encoding import Groups
from xsmae.scenes.manifest import Manifest
from xsmae.scenes.rows import Here
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder

CHIP, TILE, PATCH = 224, 512, 16  # pixels
GSD, SCALE = 10.0, 1e-4
UNITS = f"uint16 numbers * {SCALE} + 0"
BANDS = ("red", "green", "blue", "nir")
LONGEST = 9000  # number of a pixel


def write_scene(path: Path, rows: int) -> None:
    """A scene of `rows` by `rows` chips."""
    side, rng = rows * CHIP, np.random.default_rng(0)
    profile = {
        "driver": "GTiff", "height": side, "width": side, "count": len(BANDS),
        "dtype": "uint16", "crs": "EPSG:32633", "tiled": True, "blockxsize": TILE,
        "blockysize": TILE, "compress": "deflate",
        "transform": rasterio.Affine(GSD, 0, 5e5, 0, -GSD, 5e6),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as raster:
        raster.descriptions = BANDS
        for top in range(0, side, TILE):
            high = min(TILE, side - top)
            numbers = rng.integers(1, LONGEST, (len(BANDS), high, side), np.uint16)
            raster.write(numbers, window=((top, top + high), (0, side)))


def random_encoder(size: str) -> Encoder:
    """An encoder of a size of the configs, with random weights."""
    config = common.get_common("published", size, "mae")
    config.model.patch_size = PATCH
    bands = Bands(BANDS, (0.4,) * 4, (0.2,) * 4, dtype="float32", units=UNITS)
    info = describe_encoder(
        config.model.to_dict(), image_size=CHIP, bands=bands, run={}
    )
    return Encoder.random(info, seed=0)


def own_rate(groups: Groups, count: int) -> float:
    """Chips per second from memory."""
    rng = np.random.default_rng(0)
    images = rng.random((groups.size, CHIP, CHIP, len(BANDS)), np.float32)
    gsd = np.full(2, GSD, np.float32)
    chips = ((i, images[i % groups.size], gsd) for i in range(count))
    begin = time.perf_counter()
    done = sum(len(keys) for keys, _ in groups.run(chips))
    return done / (time.perf_counter() - begin)


def embed_rate(encoder: Encoder, groups: Groups, scene: Path, out: Path) -> float:
    """Chips per second from the scene's file to the table."""
    plan = Plan(Length(CHIP, metres=False)).of(encoder)
    begin = time.perf_counter()
    with open_raster(scene, scale=SCALE) as raster:
        manifest = Manifest.read(out / "manifest.json")
        embed_scene(
            Chips.of,
            encoder,
            Here(groups),
            raster,
            manifest,
            name=scene.stem,
            source=scene.name,
            plan=plan,
        )
    return manifest.scenes[scene.stem]["rows"] / (time.perf_counter() - begin)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", choices=tuple(common.SIZES))
    parser.add_argument("--rows", type=int, default=12, help="of chips, and columns")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(json.dumps({**machine(), **vars(options)}), flush=True)
    encoder = random_encoder(options.size)
    groups = Groups(encoder, pooling="mean", batch_size=64)
    found = []
    with tempfile.TemporaryDirectory() as name:
        scene = Path(name, "scene.tif")
        write_scene(scene, options.rows)
        for turn in range(options.rounds + 1):
            out = Path(name, str(turn))
            out.mkdir()
            row = {
                "own": own_rate(groups, options.rows**2),
                "embed": embed_rate(encoder, groups, scene, out),
            }
            if turn:
                found.append(row | {"ratio": row["embed"] / row["own"]})
                print(json.dumps(found[-1]), flush=True)
    middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
    print("| size | own, chips/s | embed, chips/s | ratio |\n|---|---:|---:|---:|")
    print(
        f"| {options.size} | {middle['own']:.3g} | {middle['embed']:.3g} | "
        f"{middle['ratio']:.3f} |"
    )


if __name__ == "__main__":
    main()
