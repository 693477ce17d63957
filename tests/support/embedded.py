"""Embedded scenes that tests write themselves: a table or a GeoTIFF."""

from __future__ import annotations

import datetime
import json

import numpy as np

from tests.support.chip_tables import footer
from tests.support.rasters import UTM
from xsmae.data.raster_write import Layers, write_cog
from xsmae.evaluation.segmentation.windows import window_starts
from xsmae.scenes.chip_table import Chips, ChipTable, SceneFacts
from xsmae.scenes.quantize import quantize

SIZE = 16  # pixels of a chip
PATCH = 4
TIME = datetime.datetime(2020, 8, 31, tzinfo=datetime.UTC)


def write_chips(
    folder,
    name,
    vectors,
    *,
    stride=SIZE,
    moved=0,
    transform=UTM,
    crs="EPSG:32633",
    dtype="float32",
    order=None,
    scene=None,
    **emb,
):
    """A table of the chips of [rows, columns, width], NaN where there is none.

    moved: pixels by which the last row and column are moved back. order: of the rows.
    scene: what the footer says of the scene, if not the truth.
    """
    vectors = np.asarray(vectors, np.float32)
    rows, columns, width = vectors.shape
    pixels = [(n - 1) * stride + SIZE - moved for n in (rows, columns)]
    tops, lefts = (np.array(window_starts(n, SIZE, stride)) for n in pixels)
    assert (len(tops), len(lefts)) == (rows, columns)
    i, j = np.nonzero(np.isfinite(vectors[..., 0]))
    order = np.arange(len(i)) if order is None else order
    i, j = i[order], j[order]
    stored, scale = vectors[i, j].astype(dtype), None
    if dtype == "int8":
        stored, scale = quantize(vectors[i, j])
    told = footer(width, **emb) | {"job": f"job of {name}"}
    told["emb:chip_layout"] = {"chip_size": [SIZE, SIZE], "stride": [stride, stride]}
    folder.mkdir(parents=True, exist_ok=True)
    told["scene"] = _scene(folder, name, pixels, transform) if scene is None else scene
    facts = SceneFacts(name, told["scene"].get("source", name), TIME, crs, (SIZE, SIZE))
    with ChipTable(folder / f"{name}.parquet", facts, told) as table:
        table.add(
            Chips(
                embedding=stored,
                scale=scale,
                outlines=[None] * len(i),
                place=np.column_stack([tops[i], lefts[j]]),
                gsd=np.full((len(i), 2), 10.0),
                valid_fraction=np.ones(len(i)),
            )
        )


def write_patches(folder, name, vectors, *, transform=UTM, crs="EPSG:32633", **emb):
    """A GeoTIFF of [rows, columns, width], NaN where there is none."""
    from affine import Affine

    vectors = np.asarray(vectors, np.float32)
    rows, columns, width = vectors.shape
    told = footer(width, **{"pooling": "none", "patch_size": PATCH} | emb)
    pixels = [rows * PATCH - 1, columns * PATCH - 3]  # the last ones leave the scene
    scene = _scene(folder, name, pixels, transform)
    told |= {"job": f"job of {name}", "scene": scene}
    layers = Layers(
        np.ascontiguousarray(vectors.transpose(0, 2, 1)),
        [f"feature_{i}" for i in range(width)],
        resampling="AVERAGE",
        tags={"EMB": json.dumps(told)},
        nodata=np.nan,
        transform=Affine(
            *(x if i in (2, 5) else x * PATCH for i, x in enumerate(transform))
        ),
        crs=crs,
        side=128,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_cog(folder / f"{name}.tif", layers, scratch=folder / ".scratch.tif")
    (folder / ".scratch.tif").unlink()


def _scene(folder, name, pixels, transform):
    return {
        "source": str(folder.parent / f"{name}_scene.tif"),
        "datetime": TIME.isoformat(),
        "shape": list(pixels),
        "transform": list(transform)[:6],
        "gsd": [10.0, 10.0],
    }
