"""Chips that a search found: their facts, as CSV and as GeoJSON."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xsmae.errors import printable
from xsmae.process.files import atomic_write
from xsmae.scenes.places import Places, outline_of

if TYPE_CHECKING:
    from xsmae.scenes.outlines import Outline
    from xsmae.scenes.stored import Stored

COLUMNS = (
    "id", "geometry", "bbox", "source", "datetime", "crs", "row", "col", "height",
    "width", "gsd_x", "gsd_y",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip of a scene.

    number: of its row in all tables; None for a chip of no table. outline, centre
    (longitude, latitude): None where it has no place on Earth. row, col: its first
    pixel in `source`. height, width: in pixels. ground: metres along y and x. time:
    of the image, None if unknown.
    """

    number: int | None
    id: str
    outline: Outline | None
    centre: tuple[float, float] | None
    source: str
    time: datetime.datetime | None
    crs: str | None
    row: int
    col: int
    height: int
    width: int
    ground: tuple[float, float]

    @property
    def date(self) -> str:
        """The day it was taken, empty if unknown."""
        return "" if self.time is None else self.time.date().isoformat()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit(Chip):
    """A chip that was found. rank: from 1 on. score: the cosine similarity."""

    rank: int
    score: float


def read_chips(stored: Stored, numbers: Sequence[int]) -> list[Chip]:
    """The chips of rows, in their order."""
    if not len(numbers):
        return []
    table = stored.rows(numbers, COLUMNS)
    centres = Places.of(table).centres()
    found = []
    for number, row, centre in zip(numbers, table.to_pylist(), centres, strict=True):
        shape = row["geometry"]
        found.append(
            Chip(
                number=int(number),
                id=row["id"],
                outline=None if shape is None else outline_of(shape),
                centre=None if shape is None else tuple(centre.tolist()),
                source=row["source"],
                time=row["datetime"],
                crs=row["crs"],
                row=row["row"],
                col=row["col"],
                height=row["height"],
                width=row["width"],
                ground=(row["gsd_y"] * stored.side, row["gsd_x"] * stored.side),
            )
        )
    return found


def as_hit(chip: Chip, rank: int, score: float) -> Hit:
    """The chip as a hit."""
    return Hit(**vars(chip), rank=rank, score=score)


def _facts(hit: Hit) -> dict[str, object]:
    longitude, latitude = hit.centre or (None, None)
    return {
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "id": hit.id,
        "longitude": longitude,
        "latitude": latitude,
        "datetime": None if hit.time is None else hit.time.isoformat(),
        "source": hit.source,
        "row": hit.row,
        "col": hit.col,
        "height": hit.height,
        "width": hit.width,
        "ground_y_m": round(hit.ground[0], 3),
        "ground_x_m": round(hit.ground[1], 3),
        "crs": hit.crs,
    }


def write_csv(path: Path, hits: Sequence[Hit]) -> None:
    """A row for each hit."""
    names = [
        "rank", "score", "id", "longitude", "latitude", "datetime", "source", "row",
        "col", "height", "width", "ground_y_m", "ground_x_m", "crs",
    ]  # fmt: skip
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(map(_facts, hits))


def write_geojson(path: Path, hits: Sequence[Hit]) -> None:
    """A feature for each hit; its geometry is null where it has no place on Earth."""
    features = [
        {
            "type": "Feature",
            "id": hit.id,
            "geometry": None if hit.outline is None else hit.outline.geojson(),
            "properties": _facts(hit),
        }
        for hit in hits
    ]
    content = {"type": "FeatureCollection", "features": features}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def as_text(hits: Sequence[Hit]) -> str:
    """A table for a terminal."""
    rows = [("rank", "score", "id", "longitude", "latitude", "date", "source")]
    for hit in hits:
        place = ("", "") if hit.centre is None else (f"{x:.5f}" for x in hit.centre)
        facts = (hit.id, *place, hit.date, hit.source)
        rows.append((str(hit.rank), f"{hit.score:.4f}", *map(printable, facts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        # Numbers to the right, names to the left.
        line = "  ".join(
            x.rjust(w) if i in (0, 1, 3, 4) else x.ljust(w) for x, w, i in cells
        )
        lines.append(line.rstrip())
    return "\n".join(lines)
