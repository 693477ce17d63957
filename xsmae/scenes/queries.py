"""What a search looks for: chips by id, by place, and images, as one vector.

    q = mean of the wanted - AWAY * mean of the unwanted

of vectors of unit length (Rocchio).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.data.raster import Raster, open_raster
from xsmae.errors import UserError, printable
from xsmae.scenes.chips import ChipReader, Grid, Length, Panel
from xsmae.scenes.encoding import Groups
from xsmae.scenes.hits import Chip, read_chips
from xsmae.scenes.inputs import reading_of
from xsmae.scenes.places import (
    COLUMNS,
    Box,
    Places,
    distances,
    holds,
    nearest_first,
    outline_of,
    point_of,
)
from xsmae.scenes.stored import Stored, unit
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    from jaxtyping import Float

    # The id of a chip, a place (longitude, latitude), or an image.
    Query = str | tuple[float, float] | Path | Raster

# Less than 1: embeddings have a large part in common, and without it, hits are like
# neither.
AWAY = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A query: the chip, and its vector of unit length."""

    chip: Chip
    vector: Float[np.ndarray, " width"]


def find_queries(
    stored: Stored,
    queries: Sequence[Query],
    encoder: Encoder | None,
    options: Mapping[str, Any],
) -> list[Found]:
    """The chip and the vector of each query, in order.

    encoder: for images; that of the tables. options: of `open_raster`, for images.
    Raises UserError if a query is not found.
    """
    ids = [query for query in queries if isinstance(query, str)]
    points = [point_of(q) for q in queries if isinstance(q, tuple)]
    rows = _rows_of_ids(stored, ids) + _rows_at(stored, points)
    chips = iter(read_chips(stored, rows))
    known = {} if not rows else dict(zip(rows, stored.vectors(rows), strict=True))
    kinds = (str, tuple)
    of_ids = [next(chips) for _ in ids]
    of_points = list(chips)
    found = []
    for query in queries:
        if isinstance(query, kinds):
            chip = (of_ids if isinstance(query, str) else of_points).pop(0)
            found.append(Found(chip, known[chip.number]))
        elif isinstance(query, os.PathLike | Raster):
            found.append(_of_image(stored, query, encoder, options))
        else:
            raise UserError(
                f"query {query!r}, expected the id of a chip, (longitude, latitude), "
                "or a pathlib.Path of an image"
            )
    return found


def combine(
    wanted: Sequence[Found], unwanted: Sequence[Found]
) -> Float[np.ndarray, " width"]:
    """The vector to look for, of unit length; UserError if nothing is left."""
    vector = np.mean([query.vector for query in wanted], axis=0)
    if unwanted:
        vector = vector - AWAY * np.mean([query.vector for query in unwanted], axis=0)
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or length < 1e-6:
        raise UserError(
            "the vectors of the queries cancel each other, or are zeros: give other "
            "queries"
        )
    return unit(vector)


def _rows_of_ids(stored: Stored, ids: Sequence[str]) -> list[int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not ids:
        return []
    found: dict[str, list[int]] = {name: [] for name in ids}
    example = ""
    for start, batch in stored.batches(["id"]):
        column = batch.column("id")
        example = example or column[0].as_py()
        inside = pc.is_in(column, value_set=pa.array(list(found)))
        for place in np.flatnonzero(inside.to_numpy(zero_copy_only=False)):
            found[column[int(place)].as_py()].append(start + int(place))
    for name, rows in found.items():
        if len(rows) != 1:
            told = f"{len(rows)} chips have" if rows else "no chip has"
            raise UserError(
                f"{told} the id {printable(name)} in {printable(str(stored.folder))}; "
                f"expected an id such as {printable(example)}"
            )
    return [found[name][0] for name in ids]


def _rows_at(stored: Stored, points: Sequence[tuple[float, float]]) -> list[int]:
    """The chip at each place: of several, that with the nearest centre."""
    if not points:
        return []
    best: list[tuple[float, int | None]] = [(np.inf, None)] * len(points)
    nearest: list[tuple[float, int | None]] = list(best)
    for start, batch in stored.batches(COLUMNS):
        away = distances(np.array(points), Places.of(batch).centres())
        shapes = batch.column("geometry")
        for i, point in enumerate(points):
            order = nearest_first(away[i])
            first = int(order[0])
            if away[i, first] < nearest[i][0]:
                nearest[i] = float(away[i, first]), start + first
            inside = _inside(batch, *point)
            for place in order[np.isin(order, inside)]:
                if away[i, place] >= best[i][0]:
                    break
                if holds(outline_of(shapes[int(place)].as_py()), *point):
                    best[i] = float(away[i, place]), start + int(place)
                    break
    for point, (_, row), (away, other) in zip(points, best, nearest, strict=True):
        if row is None:
            where = printable(str(stored.folder))
            text = f"no chip of {where} has the point {point[0]:g},{point[1]:g}"
            if other is None:
                raise UserError(f"{text}: its chips have no place on Earth; give an id")
            (chip,) = read_chips(stored, [other])
            raise UserError(
                f"{text}; the nearest is {printable(chip.id)}, its centre "
                f"{chip.centre[0]:.6f},{chip.centre[1]:.6f} is {away:,.0f} m away"
            )
    return [row for _, row in best]


def _inside(batch, longitude: float, latitude: float) -> np.ndarray:
    """Chips whose box has the place."""
    box = Box(longitude, latitude, longitude, latitude)
    return np.flatnonzero(Places.of(batch).in_box(box))


def _of_image(
    stored: Stored,
    image: os.PathLike | Raster,
    encoder: Encoder | None,
    options: Mapping[str, Any],
) -> Found:
    """An image as the chips were embedded: its middle, of the size of a chip."""
    if encoder is None:
        raise UserError(
            "an image needs the encoder of the embeddings: give --encoder=FOLDER"
        )
    own = not isinstance(image, Raster)
    opened = open_raster(image, **options) if own else contextlib.nullcontext(image)
    with opened as raster:
        missing = "mean" if stored.filled else "refuse"
        reading = reading_of("the encoder", encoder.bands, raster, missing)
        grid = _middle(stored, raster)
        reader = ChipReader.of(raster, reading, grid)
        pixels, valid = reader.read(Panel(range(1), range(1)))
        if not valid[0]:
            raise UserError(
                f"{printable(raster.path)} has no pixel with a value in its middle: "
                "give another image"
            )
        place = grid.places(*np.zeros((2, 1), int))
        gsd = reader.gsd(place)
        groups = Groups(encoder, pooling=stored.pooling, batch_size=1)
        (_, vectors), *_ = groups.run(iter([(0, pixels[0], gsd[0])]))
        chip = _chip_of(raster, grid, gsd[0])
    return Found(chip, unit(vectors[0]))


def _middle(stored: Stored, raster: Raster) -> Grid:
    """The window in the middle of an image, of the size of a chip."""
    gsd, sizes = raster.known_gsd(), stored.chip_sizes
    if len(sizes) == 1:
        (size,) = sizes
    else:  # chips of one size on the ground, in pixels of different scenes
        ground = max(read_chips(stored, [0])[0].ground)
        size = Length(ground, metres=True).pixels(gsd)
    height, width = raster.shape
    if size[0] > height or size[1] > width:
        raise UserError(
            f"{printable(raster.path)} has {height} x {width} pixels, expected at "
            f"least a chip of {size[0]} x {size[1]}: give an image of more ground"
        )
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return Grid(size, size, (stored.side, stored.side), (top,), (left,))


def _chip_of(raster: Raster, grid: Grid, gsd: np.ndarray) -> Chip:
    return Chip(
        number=None,
        id=printable(Path(raster.path).name),
        outline=None,
        centre=None,
        source=printable(raster.path),
        time=None,
        crs=raster.crs,
        row=grid.tops[0],
        col=grid.lefts[0],
        height=grid.size[0],
        width=grid.size[1],
        ground=tuple(float(x) for x in gsd * grid.side),
    )


def check_encoder(stored: Stored, encoder: Encoder) -> Encoder:
    """The encoder, if the tables are of it; UserError otherwise."""
    if encoder.digest != stored.digest:
        raise UserError(
            f"{printable(str(stored.folder))} has embeddings of the encoder "
            f"{stored.digest}, --encoder is {encoder.digest}: vectors of both cannot "
            "be compared; give the encoder of the embeddings"
        )
    return encoder
