"""A raster cut into cells: how much of each is valid, and its size on the ground.

What was found of a raster is a row of plain numbers and text, as the cache keeps it;
`scene_of` makes a scene of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xsmae.data import gdal
from xsmae.data.geotiff_cache import Row
from xsmae.data.geotiff_listing import Entry
from xsmae.data.raster import Raster
from xsmae.data.raster_gsd import ground_size

# Cells have GSDs of their own where these differ by more.
_GSD_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One raster of an index.

    rows, columns: the cells' edges in pixels. valid: [down, across] part of each cell,
    NaN where it cannot be read. gsd: metres per pixel along y and x at the centre.
    gsds: [down, across, 2], of each cell; None where they are all alike. transform: its
    six numbers, a to f. block: height and width of what GDAL decodes at a time.
    """

    entry: Entry
    bands: tuple[str, ...]
    dtype: str
    crs: str | None
    transform: tuple[float, ...]
    shape: tuple[int, int]
    block: tuple[int, int]
    gsd: tuple[float, float]
    rows: np.ndarray
    columns: np.ndarray
    valid: np.ndarray
    gsds: np.ndarray | None
    notes: tuple[str, ...]


def look(raster: Raster, window: int) -> Row:
    """What there is to know of a raster; UserError where its GSD is not known."""
    gsd = raster.known_gsd()
    rows, columns = (
        cell_edges(length, window, block)
        for length, block in zip(raster.shape, raster.block_shape, strict=True)
    )
    valid = raster.valid_cells(rows, columns)
    return {
        "bands": list(raster.bands),
        "dtype": raster.dtype,
        "crs": raster.crs,
        "transform": list(raster.transform)[:6],
        "shape": list(raster.shape),
        "block": list(raster.block_shape),
        "gsd": list(gsd),
        "rows": rows,
        "columns": columns,
        # 1 for a scene without a mask, which has many cells.
        "valid": 1 if (valid == 1).all() else np.round(valid, 4).tolist(),
        "gsds": _gsds(raster, rows, columns),
        "notes": raster.notes(),
    }


def _gsds(raster: Raster, rows: list[int], columns: list[int]) -> list | None:
    """The GSD of each cell, as many times the raster's own as its CRS says there."""
    if raster.crs is None or raster.transform.is_identity:
        return None
    middle = [np.convolve(edges, [0.5, 0.5], "valid") for edges in (rows, columns)]
    centre = np.array(raster.shape) / 2
    with gdal.gdal(raster.path):
        there = ground_size(
            raster.transform, raster.crs, *np.meshgrid(*middle, indexing="ij")
        )
        here = ground_size(raster.transform, raster.crs, *centre)
    ratio = there / here
    if not np.isfinite(ratio).all() or np.allclose(ratio, 1, atol=_GSD_TOLERANCE):
        return None
    return np.round(ratio * raster.gsd, 6).tolist()


def cell_edges(length: int, side: int, block: int) -> list[int]:
    """Edges of cells of about `side` along an axis, at edges of blocks where it can be.

    The last cell takes a rest that is less than half a cell.
    """
    if block <= side:
        step = block * max(1, round(side / block))
    else:
        parts = -(-block // side)
        step = side if block % parts else block // parts
    edges = list(range(0, length, step))
    if len(edges) > 1 and length - edges[-1] < step / 2:
        edges.pop()
    return [*edges, length]


def shared_reads(
    boxes: Sequence[tuple[int, int, int, int]], block: tuple[int, int], most: int
) -> list[list[int]]:
    """The windows of a raster in groups of at most `most` whose blocks are the same.

    boxes: top, left, height, width. A window that consists of whole blocks is alone.
    The windows of long blocks, such as strips, are divided so that those of a group lie
    far apart: they should differ.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for place, (top, left, height, width) in enumerate(boxes):
        key = (
            top // block[0] * block[0] if block[0] > height else top,
            left // block[1] * block[1] if block[1] > width else left,
        )
        sharing.setdefault(key, []).append(place)
    groups = []
    for places in sharing.values():
        parts = -(-len(places) // most)
        groups += [places[part::parts] for part in range(parts)]
    return groups


def scene_of(entry: Entry, row: Row) -> Scene:
    """The scene of a row of `look`."""
    rows, columns = np.array(row["rows"]), np.array(row["columns"])
    shape = (len(rows) - 1, len(columns) - 1)
    return Scene(
        entry=entry,
        bands=tuple(row["bands"]),
        dtype=row["dtype"],
        crs=row["crs"],
        transform=tuple(row["transform"]),
        shape=tuple(row["shape"]),
        block=tuple(row["block"]),
        gsd=tuple(row["gsd"]),
        rows=rows,
        columns=columns,
        valid=np.broadcast_to(np.array(row["valid"], float), shape),
        gsds=None if row["gsds"] is None else np.array(row["gsds"]),
        notes=tuple(row["notes"]),
    )
