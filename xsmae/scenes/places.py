"""Where stored chips are on Earth: boxes, polygons, distances.

A box goes from west to east; west above east is a box across the antimeridian. A chip
across it has a part on each side, and each part has a box.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.raster_gsd import on_ellipsoid
from xsmae.errors import UserError
from xsmae.scenes.chip_table import BOX
from xsmae.scenes.outlines import MULTI_POLYGON, POLYGON, Outline

if TYPE_CHECKING:
    import pyarrow
    from jaxtyping import Bool, Float, Int

RADIUS = 6_371_009.0  # metres, of a sphere, for arcs over chords
COLUMNS = ("bbox", "geometry")
PAIRS = 2**20  # of places whose distances are computed at a time


@dataclasses.dataclass(frozen=True)
class Box:
    """Longitudes and latitudes in degrees."""

    west: float
    south: float
    east: float
    north: float

    @classmethod
    def of(cls, numbers) -> Box:
        """Of four numbers; UserError if they are no box."""
        try:
            west, south, east, north = map(float, numbers)
            good = max(abs(west), abs(east)) <= 180 and -90 <= south <= north <= 90
        except (TypeError, ValueError):
            good = False
        if not good:
            told = ",".join(map(str, numbers))
            raise UserError(
                f"bbox={told}, expected west,south,east,north in degrees, with south "
                "at most north; west above east is a box across the antimeridian"
            )
        return cls(west, south, east, north)

    def turns(self) -> list[tuple[float, float]]:
        """From west to east: one range of longitudes, or two."""
        if self.west <= self.east:
            return [(self.west, self.east)]
        return [(self.west, 180.0), (-180.0, self.east)]


def point_of(numbers) -> tuple[float, float]:
    """Longitude and latitude; UserError if they are no place."""
    try:
        longitude, latitude = map(float, numbers)
        good = abs(longitude) <= 180 and abs(latitude) <= 90
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UserError(
            f"point={','.join(map(str, numbers))}, expected longitude,latitude in "
            "degrees: the longitude comes first"
        )
    return longitude, latitude


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """The places of some chips.

    boxes: of each part of each chip; NaN where there is none.
    """

    boxes: Float[np.ndarray, "chips parts 4"]

    @classmethod
    def of(cls, batch: pyarrow.RecordBatch | pyarrow.Table) -> Places:
        """Of the columns `bbox` and `geometry` of a table."""
        struct_ = batch.column("bbox")
        if hasattr(struct_, "combine_chunks"):
            struct_ = struct_.combine_chunks()
        boxes = np.column_stack(
            [
                struct_.field(side).to_numpy(zero_copy_only=False).astype(float)
                for side in BOX
            ]
        ).reshape(-1, 1, 4)
        missing = struct_.is_null().to_numpy(zero_copy_only=False)
        boxes[missing] = np.nan
        # The box of a chip across the antimeridian goes around the Earth.
        wide = np.flatnonzero(boxes[:, 0, 2] - boxes[:, 0, 0] > 180)
        shapes = batch.column("geometry")
        parts = {i: outline_of(shapes[i].as_py()).rings for i in wide.tolist()}
        most = max(map(len, parts.values()), default=1)
        found = np.full((len(boxes), most, 4), np.nan)
        found[:, :1] = boxes
        for i, rings in parts.items():
            for j, ring in enumerate(rings):
                found[i, j] = *ring.min(axis=0), *ring.max(axis=0)
        return cls(found)

    def __len__(self) -> int:
        return len(self.boxes)

    def in_box(self, box: Box) -> Bool[np.ndarray, " chips"]:
        """True where the box of a part and `box` have a place in common."""
        west, south, east, north = np.moveaxis(self.boxes, -1, 0)
        found = np.zeros(west.shape, bool)
        for begin, end in box.turns():
            found |= (west <= end) & (east >= begin)
        return (found & (south <= box.north) & (north >= box.south)).any(axis=1)

    def centres(self) -> Float[np.ndarray, "chips 2"]:
        """Longitude and latitude of the middle of each; NaN where there is none."""
        boxes = self.boxes.copy()
        if boxes.shape[1] > 1:  # continue to the east, so that the parts meet
            split = ~np.isnan(boxes[:, 1:, 0]).all(axis=1)
            western = split[:, None] & (boxes[..., 2] <= 0)
            boxes[western] += [360, 0, 360, 0]
        west, south = np.fmin.reduce(boxes[..., :2], axis=1).T
        east, north = np.fmax.reduce(boxes[..., 2:], axis=1).T
        longitude = (west + east) / 2
        longitude = np.where(longitude > 180, longitude - 360, longitude)
        return np.column_stack([longitude, (south + north) / 2])


def distances(
    here: Float[np.ndarray, "n 2"], there: Float[np.ndarray, "m 2"]
) -> Float[np.ndarray, "n m"]:
    """Metres on the ground between places, longitude and latitude; NaN for none.

    The arc over the straight line between places of the ellipsoid: right to 1e-5 up
    to 100 km, to 0.5% anywhere.
    """
    here, there = (on_ellipsoid(*np.reshape(x, (-1, 2)).T) for x in (here, there))
    chord = np.linalg.norm(here[:, None] - there[None], axis=-1)
    return 2 * RADIUS * np.arcsin(np.minimum(chord / (2 * RADIUS), 1))


def outline_of(wkb: bytes) -> Outline:
    """The outline that `Outline.wkb` wrote; UserError for other geometries."""
    try:
        kind = struct.unpack_from("<BI", wkb)
        if kind == (1, POLYGON):
            rings, _ = _polygon(wkb, 0)
            return Outline((rings,))
        if kind != (1, MULTI_POLYGON):
            raise ValueError
        (count,) = struct.unpack_from("<I", wkb, 5)
        rings, at = [], 9
        for _ in range(count):
            ring, at = _polygon(wkb, at)
            rings.append(ring)
        return Outline(tuple(rings))
    except (struct.error, ValueError, TypeError):
        raise UserError(
            "a geometry is no polygon of xsmae embed: embed the scenes again"
        ) from None


def _polygon(wkb: bytes, at: int) -> tuple[np.ndarray, int]:
    order, kind, rings, points = struct.unpack_from("<BIII", wkb, at)
    if (order, kind, rings) != (1, POLYGON, 1) or points < 4:
        raise ValueError
    at += 13
    found = np.frombuffer(wkb, "<f8", 2 * points, at).reshape(-1, 2)
    return found[:-1], at + 16 * points


def holds(outline: Outline, longitude: float, latitude: float) -> bool:
    """True if the place is in the outline."""
    return any(_in_ring(ring, longitude, latitude) for ring in outline.rings)


def _in_ring(ring: Float[np.ndarray, "points 2"], x: float, y: float) -> bool:
    """Counts the edges to the east of the place."""
    (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
    crosses = (y1 > y) != (y2 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x1 + (y - y1) / (y2 - y1) * (x2 - x1)
    return bool((crosses & (at > x)).sum() % 2)


def far_from(
    centres: Float[np.ndarray, "n 2"], others: Float[np.ndarray, "m 2"], apart: float
) -> Bool[np.ndarray, " n"]:
    """True where a place is known and at least `apart` metres from all others."""
    found = ~np.isnan(centres).any(axis=1)
    step = max(PAIRS // max(len(centres), 1), 1)
    for start in range(0, len(others), step):
        away = distances(centres[found], others[start : start + step])
        found[found] = (away >= apart).all(axis=1)
    return found


def nearest_first(
    distance: Float[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """The order by distance; places that are not known come last."""
    return np.argsort(np.where(np.isnan(distance), np.inf, distance), kind="stable")
