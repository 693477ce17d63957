"""Tables of embeddings that tests write themselves, without an encoder."""

from __future__ import annotations

import datetime

import numpy as np

from xsmae.scenes.chip_table import Chips, ChipTable, SceneFacts
from xsmae.scenes.outlines import Outline
from xsmae.scenes.quantize import quantize

TIME = datetime.datetime(2020, 8, 31, tzinfo=datetime.UTC)
SIDE = 32  # pixels of a chip
HALF = 0.001  # degrees from the centre of a chip to its edges


def footer(width, *, digest="a" * 16, **changes):
    """The content of the key `emb`."""
    parameters = {"size": [SIDE, SIDE], "pooling": "mean", "filled_with_mean": []}
    return {
        "emb:dimensions": width,
        "emb:chip_layout": {"chip_size": [SIDE, SIDE]},
        "emb:runtime_parameters": parameters | changes,
        "model": {"digest": digest},
    }


def around(longitude, latitude):
    """The outline of a chip, in two parts across the antimeridian."""
    west, east = longitude - HALF, longitude + HALF
    south, north = latitude - HALF, latitude + HALF

    def ring(west, east):
        return np.array([(west, south), (east, south), (east, north), (west, north)])

    if east <= 180:
        return Outline((ring(west, east),))
    return Outline((ring(west, 180), ring(-180, east - 360)))


def write_table(
    path, vectors, centres, *, dtype="float32", groups=1, source="scenes/a.tif", **emb
):
    """A table whose chips are around `centres` (longitude, latitude), None for none."""
    vectors, scale = np.asarray(vectors, np.float32), None
    stored = vectors.astype(dtype)
    if dtype == "int8":
        stored, scale = quantize(vectors)
    count, width = vectors.shape
    outlines = [None if c is None else around(*c) for c in centres]
    places = np.column_stack([np.arange(count) * SIDE, np.zeros(count, int)])
    facts = SceneFacts(path.stem, source, TIME, "EPSG:4326", (SIDE, SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with ChipTable(path, facts, footer(width, **emb)) as table:
        for part in np.array_split(np.arange(count), groups):
            table.add(
                Chips(
                    embedding=stored[part],
                    scale=None if scale is None else scale[part],
                    outlines=[outlines[i] for i in part],
                    place=places[part],
                    gsd=np.full((len(part), 2), (5.0, 4.0)),
                    valid_fraction=np.ones(len(part)),
                )
            )
    return path
