"""The table of a scene's embeddings: GeoParquet 1.1, a row for each chip.

The file's metadata has two JSON objects: `geo`, as GeoParquet defines it, and `emb`,
with the names of the STAC embedding extension 0.0.1.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.scenes.outlines import Outline, box_of

if TYPE_CHECKING:
    import pyarrow
    from jaxtyping import Float, Int, Shaped

DTYPES = ("float16", "float32", "int8")
GROUP_BYTES = 128 * 2**20  # of a row group, before compression
BOX = ("xmin", "ymin", "xmax", "ymax")


@dataclasses.dataclass(frozen=True, eq=False)
class Chips:
    """Some chips of one scene, in the order of the table.

    place: row and column of the first pixel. gsd: metres per pixel along y and x.
    scale: one number for each chip, for int8: value = number * scale. outlines: None
    where there is no place on Earth.
    """

    embedding: Shaped[np.ndarray, "chips width"]
    scale: Float[np.ndarray, " chips"] | None
    outlines: Sequence[Outline | None]
    place: Int[np.ndarray, "chips 2"]
    gsd: Float[np.ndarray, "chips 2"]
    valid_fraction: Float[np.ndarray, " chips"]


@dataclasses.dataclass(frozen=True)
class SceneFacts:
    """What all chips of a scene share.

    name: the beginning of their ids. source: the path or URL that was read. time: of
    the image, None if unknown. size: height and width of a chip in pixels. end: of an
    interval that begins at `time`.
    """

    name: str
    source: str
    time: datetime.datetime | None
    crs: str | None
    size: tuple[int, int]
    end: datetime.datetime | None = None


def rows_per_group(width: int, dtype: str) -> int:
    """Rows of about `GROUP_BYTES`."""
    # An outline and the other columns take about 300 bytes.
    return max(GROUP_BYTES // (width * np.dtype(dtype).itemsize + 300), 1)


class ChipTable:
    """Writes the table of a scene to `path`, one row group at a time; a context.

    emb: the content of the key `emb`. The same rows give the same bytes.
    """

    def __init__(self, path: Path, scene: SceneFacts, emb: Mapping[str, Any]):
        self.path, self.scene, self.emb = path, scene, dict(emb)
        self.rows = 0
        self._outlines: list[Outline] = []
        self._file = None

    def __enter__(self) -> ChipTable:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._file is None:
            return
        if kind is None:
            more = {"geo": self._geo(), "emb": self.emb}
            more = {key: json.dumps(value) for key, value in more.items()}
            self._file.add_key_value_metadata(more)
        self._file.close()

    def add(self, chips: Chips) -> None:
        """Write a row group."""
        from pyarrow import parquet

        table = _table(self.scene, chips)
        if self._file is None:
            self._file = parquet.ParquetWriter(
                self.path,
                table.schema,
                compression="zstd",
                # Vectors do not repeat. Names and the CRS do.
                use_dictionary=["source", "crs"],
                write_statistics=_with_statistics(table.schema),
            )
        self._file.write_table(table, row_group_size=max(len(table), 1))
        self.rows += len(table)
        self._outlines += [o for o in chips.outlines if o is not None]

    def _geo(self) -> dict[str, Any]:
        kinds = {"MultiPolygon" if o.crosses else "Polygon" for o in self._outlines}
        column = {
            "encoding": "WKB",
            "geometry_types": sorted(kinds),
            "orientation": "counterclockwise",
            "edges": "planar",
            "covering": {"bbox": {side: ["bbox", side] for side in BOX}},
        }
        box = box_of(self._outlines)
        if box is not None:
            column["bbox"] = list(box)
        columns = {"geometry": column}
        return {"version": "1.1.0", "primary_column": "geometry", "columns": columns}


def _with_statistics(schema: pyarrow.Schema) -> list[str]:
    """The columns that readers compare; smallest vectors and polygons mean nothing."""
    names = [n for n in schema.names if n not in ("embedding", "geometry", "bbox")]
    return [*names, *(f"bbox.{side}" for side in BOX)]


def _table(scene: SceneFacts, chips: Chips) -> pyarrow.Table:
    import pyarrow as pa

    count, width = chips.embedding.shape
    flat = pa.array(np.ascontiguousarray(chips.embedding).reshape(-1))
    columns = {
        "id": pa.array([f"{scene.name}_{r}_{c}" for r, c in chips.place.tolist()]),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    if chips.scale is not None:
        columns["scale"] = pa.array(chips.scale, pa.float32())
    shapes = [None if o is None else o.wkb() for o in chips.outlines]
    time = pa.timestamp("us", "UTC")

    def same(value, kind):
        return pa.array([value] * count, kind)

    columns |= {
        "geometry": pa.array(shapes, pa.binary()),
        "bbox": _boxes(chips.outlines),
        "source": same(scene.source, pa.string()),
        "datetime": same(scene.time, time),
        "crs": same(scene.crs, pa.string()),
        "row": pa.array(chips.place[:, 0], pa.int32()),
        "col": pa.array(chips.place[:, 1], pa.int32()),
        "height": same(scene.size[0], pa.int32()),
        "width": same(scene.size[1], pa.int32()),
        "gsd_x": pa.array(chips.gsd[:, 1], pa.float32()),
        "gsd_y": pa.array(chips.gsd[:, 0], pa.float32()),
        "valid_fraction": pa.array(chips.valid_fraction, pa.float32()),
    }
    return pa.table(columns)


def _boxes(outlines: Sequence[Outline | None]) -> pyarrow.Array:
    import pyarrow as pa

    missing = np.array([outline is None for outline in outlines], bool)
    boxes = np.array([(0.0,) * 4 if o is None else o.box for o in outlines])
    boxes = boxes.reshape(-1, 4)
    sides = [pa.array(boxes[:, i], pa.float64(), mask=missing) for i in range(4)]
    return pa.StructArray.from_arrays(sides, names=BOX, mask=pa.array(missing))


def hilbert_order(rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]):
    """The order of places along a Hilbert curve, so that neighbours stay together."""
    if not len(rows):
        return np.arange(0)
    bits = max(int(max(rows.max(), columns.max())).bit_length(), 1)
    x, y = columns.astype(np.int64), rows.astype(np.int64)
    along = np.zeros(len(x), np.int64)
    for bit in reversed(range(bits)):
        right, down = (x >> bit) & 1, (y >> bit) & 1
        along = (along << 2) | ((3 * right) ^ down)
        # Turn the quarter, so that the curve enters and leaves it at its edge.
        flip = (down == 0) & (right == 1)
        most = (1 << bit) - 1
        x, y = x & most, y & most
        x, y = np.where(flip, most - x, x), np.where(flip, most - y, y)
        x, y = np.where(down == 0, y, x), np.where(down == 0, x, y)
    return np.argsort(along, kind="stable")
