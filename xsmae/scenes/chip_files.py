"""From the finished vectors of a scene to its table, in the order of the ground."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import xsmae
from xsmae.errors import UserError
from xsmae.scenes.chip_table import (
    Chips,
    ChipTable,
    SceneFacts,
    hilbert_order,
    rows_per_group,
)
from xsmae.scenes.chips import ChipReader
from xsmae.scenes.outlines import outlines
from xsmae.scenes.quantize import AMONG, NEIGHBOURS, quantize, recall
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    from jaxtyping import Float

EXTENSION = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"


def write_chips(
    path: Path,
    strips: Strips,
    reader: ChipReader,
    facts: SceneFacts,
    *,
    dtype: str,
    min_valid: float,
    emb: dict[str, Any],
    say: Callable[[str], None],
) -> int:
    """Write the chips that have enough pixels; returns how many there are.

    strips: `vectors` and `valid` of all rows of the grid, as bytes of float32. emb: the
    content of the footer's key. Raises UserError if no chip has enough.
    """
    valid = np.array(strips.rows("valid")).view(np.float32)[..., 0]
    rows, columns = np.nonzero(enough(valid, min_valid))
    if not len(rows):
        raise UserError(
            f"no chip has {min_valid:.0%} valid pixels, the best one has "
            f"{valid.max():.1%}: lower --min_valid"
        )
    order = hilbert_order(rows, columns)
    rows, columns = rows[order], columns[order]
    width = strips.shapes["vectors"][1] // 4

    def vectors(part) -> Float[np.ndarray, "n width"]:
        # Mapped anew each time, so that pages that were read do not stay in memory.
        whole = strips.rows("vectors").view(np.float32)
        return whole[rows[part], columns[part]]

    if dtype == "int8":
        found = _recall(vectors, len(rows))
        if found is not None:
            emb["emb:quantization"]["recall_at_10"] = found
            say(
                f"int8: {found:.1%} of the {NEIGHBOURS} nearest chips of a chip are "
                "those of float32"
            )
    step = rows_per_group(width, dtype)
    with ChipTable(path, facts, emb) as table:
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            places = reader.grid.places(rows[part], columns[part])
            stored, scale = convert(vectors(part), dtype)
            windows = np.hstack([places, np.tile(reader.grid.size, (len(places), 1))])
            table.add(
                Chips(
                    embedding=stored,
                    scale=scale,
                    outlines=outlines(reader.raster, windows),
                    place=places,
                    gsd=reader.gsd(places),
                    valid_fraction=valid[rows[part], columns[part]],
                )
            )
    return len(rows)


def enough(valid: Float[np.ndarray, "*n"], min_valid: float) -> np.ndarray:
    """True for chips that are kept; without a valid pixel none is."""
    return (valid >= min_valid) & (valid > 0)


def convert(
    vectors: Float[np.ndarray, "n width"], dtype: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors as they are stored, and the scale of each for int8."""
    if dtype == "int8":
        return quantize(vectors)
    greatest = np.abs(vectors).max()
    if greatest > np.finfo(dtype).max:
        raise UserError(
            f"vectors with values up to {greatest:g} do not fit {dtype}: give "
            "--dtype=float32 or int8"
        )
    return vectors.astype(dtype), None


def _recall(vectors: Callable[[np.ndarray], np.ndarray], count: int) -> float | None:
    sample = np.arange(min(AMONG, count)) * count // min(AMONG, count)
    exact = vectors(sample)
    numbers, scale = quantize(exact)
    found = recall(exact, numbers * scale[:, None])
    return None if found is None else round(found, 4)


def footer(
    encoder: Encoder,
    reader: ChipReader,
    *,
    pooling: str,
    dtype: str,
    min_valid: float,
    job: str,
    source: str,
    time: datetime.datetime | None,
) -> dict[str, Any]:
    """The content of the key `emb`, with the names of the STAC extension.

    source: the scene, as the user calls it. time: of the scene.
    """
    grid, shape, raster = reader.grid, encoder.info["architecture"], reader.raster
    text = reader.reading.describe()
    if grid.resampled:
        text = (
            f"windows of {grid.size[0]} x {grid.size[1]} pixels resampled to "
            f"{grid.side[0]} x {grid.side[1]}; {text}"
        )
    content = {
        "stac_extensions": [EXTENSION],
        "emb:type": "chip",
        "emb:dimensions": shape["embed_dim"],
        "data_type": dtype,
        "emb:chip_layout": {
            "layout_type": "regular_grid",
            "chip_size": list(grid.size),
            "stride": list(grid.stride),
            "last_chip": "ends with the scene",
        },
        "emb:preprocessing": {"format": "text", "expression": text},
        "emb:runtime_parameters": {
            "bands": list(encoder.bands.names),
            "read_as": list(reader.reading.used),
            "filled_with_mean": list(reader.reading.filled),
            "size": list(grid.side),
            "pooling": pooling,
            "min_valid": min_valid,
        },
        "model": {
            "digest": encoder.digest,
            "dtype": encoder.dtype,
            "image_size": encoder.info["image_size"],
            "embed_dim": shape["embed_dim"],
            "depth": shape["depth"],
            "patch_size": shape["patch_size"],
        },
        "scene": {
            "source": source,
            "datetime": time and time.isoformat(),
            "shape": list(raster.shape),
            "transform": list(raster.transform[:6]),
            "gsd": list(raster.known_gsd()),
        },
        "software": f"xsmae {xsmae.__version__}",
        "job": job,
    }
    if dtype != "float32":
        content["emb:quantization"] = {
            "method": "linear" if dtype == "int8" else "cast",
            "original_dtype": "float32",
            "quantized_dtype": dtype,
        }
    if dtype == "int8":
        content["emb:quantization"]["scale_column"] = "scale"
    return content
