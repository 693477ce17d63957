"""Outlines of windows on Earth: polygons of longitude and latitude, as WKB.

A straight edge in the CRS of a raster is curved in longitude and latitude. Points are
added to an edge until its straight parts are close enough to it. A window across the
antimeridian becomes a MultiPolygon with a part on each side, and one around a pole
reaches up to the pole, as RFC 7946 asks for.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.data.raster import Raster
from xsmae.data.raster_gsd import ground_size, on_ellipsoid

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Ring = Float[np.ndarray, "points 2"]  # longitude, latitude in degrees, not closed

TOLERANCE = 0.02  # pixels between an edge and its straight parts
DEPTH = 24  # halvings of an edge; an edge that ends at a pole takes about 15
LOOKED_AT = np.array([0.25, 0.5, 0.75])  # places between two points of an edge
LITTLE_ENDIAN, POLYGON, MULTI_POLYGON = 1, 3, 6  # of WKB


@dataclasses.dataclass(frozen=True, eq=False)
class Outline:
    """The polygon of a window: one ring, or one on each side of the antimeridian."""

    rings: tuple[Ring, ...]

    @property
    def crosses(self) -> bool:
        """True if it is split at the antimeridian."""
        return len(self.rings) > 1

    @property
    def box(self) -> tuple[float, float, float, float]:
        """West, south, east, north of all rings."""
        points = np.concatenate(self.rings)
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())

    def wkb(self) -> bytes:
        """A Polygon, or a MultiPolygon where it is split."""
        parts = [_polygon(ring) for ring in self.rings]
        if len(parts) == 1:
            return parts[0]
        head = struct.pack("<BII", LITTLE_ENDIAN, MULTI_POLYGON, len(parts))
        return head + b"".join(parts)

    def geojson(self) -> dict:
        """The same as a geometry of GeoJSON."""
        rings = [[_closed(ring).tolist()] for ring in self.rings]
        if len(rings) == 1:
            return {"type": "Polygon", "coordinates": rings[0]}
        return {"type": "MultiPolygon", "coordinates": rings}


def can_be_placed(raster: Raster) -> bool:
    """True if the raster has a CRS and a geotransform."""
    return raster.crs is not None and not (
        raster.transform.is_identity or raster.transform.is_degenerate
    )


def outlines(
    raster: Raster, windows: Int[np.ndarray, "windows 4"]
) -> list[Outline | None]:
    """The outline of each window (top, left, height, width), in pixels.

    None where the CRS has no place on Earth; all are None if `can_be_placed` is false.
    """
    windows = np.asarray(windows, float)
    if not len(windows) or not can_be_placed(raster):
        return [None] * len(windows)
    with gdal.gdal(raster.path):
        grid = _Grid.of(raster)
        rings = _rings(grid, windows)
    return [_outline(ring, grid.degrees) for ring in rings]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The pixels of a raster on Earth.

    degrees: the unit of a CRS of longitude and latitude, whose longitudes continue
    across the antimeridian; None for any other CRS, whose longitudes jump there.
    """

    raster: Raster
    degrees: float | None

    @classmethod
    def of(cls, raster: Raster) -> _Grid:
        from rasterio.crs import CRS

        crs = CRS.from_user_input(raster.crs)
        degrees = None
        if crs.is_geographic:
            degrees = float(np.degrees(crs.units_factor[1]))
        return cls(raster, degrees)

    def place(self, pixels: np.ndarray) -> np.ndarray:
        """Longitude and latitude of rows and columns."""
        from rasterio import warp

        row, column = pixels[..., 0].ravel(), pixels[..., 1].ravel()
        a, b, c, d, e, f = self.raster.transform[:6]
        x, y = a * column + b * row + c, d * column + e * row + f
        found = np.array(warp.transform(self.raster.crs, "EPSG:4326", x, y))
        if self.degrees is not None:
            found[0] += 360 * np.round((x * self.degrees - found[0]) / 360)
        return found.T.reshape(pixels.shape)


def _rings(grid: _Grid, windows: Float[np.ndarray, "windows 4"]) -> list[Ring]:
    """The points of each window as they are transformed."""
    raster = grid.raster
    top, left, height, width = windows.T
    pixel = ground_size(
        raster.transform, raster.crs, top + height / 2, left + width / 2
    ).min(axis=-1)
    corners = np.stack(
        [
            np.stack([top, top + height, top + height, top], axis=1),
            np.stack([left, left, left + width, left + width], axis=1),
        ],
        axis=-1,
    )  # [windows, 4, (row, column)]

    def place(owner, along):
        """Longitude and latitude of places along the rings, 0 to 4."""
        first = np.minimum(along.astype(int), 3)
        part = (along - first)[..., None]
        begin, end = corners[owner, first], corners[owner, (first + 1) % 4]
        return grid.place((1 - part) * begin + part * end)

    owner = np.repeat(np.arange(len(windows)), 4)
    along = np.tile(np.arange(4.0), len(windows))
    points = place(owner, along)
    new = np.ones(len(owner), bool)  # parts that begin here and were not looked at
    for _ in range(DEPTH):
        at = np.flatnonzero(new)
        following = _following(owner)[at]
        begin, end = along[at], along[following]
        end = np.where(end == 0, 4.0, end)
        where = begin[:, None] + (end - begin)[:, None] * LOOKED_AT
        true = place(np.repeat(owner[at], 3).reshape(-1, 3), where)
        step = _steps(points[following] - points[at], grid.degrees)
        chord = points[at][:, None] + LOOKED_AT[:, None] * step[:, None]
        apart = np.linalg.norm(_ground(true) - _ground(chord), axis=-1).max(axis=1)
        with np.errstate(invalid="ignore"):
            far = apart > TOLERANCE * pixel[owner[at]]
        if not far.any():
            break
        owner = np.concatenate([owner, owner[at[far]]])
        along = np.concatenate([along, where[far, 1]])
        points = np.concatenate([points, true[far, 1]])
        new[:] = False
        new[at[far]] = True
        new = np.concatenate([new, np.ones(far.sum(), bool)])
        order = np.lexsort((along, owner))
        owner, along, points, new = (x[order] for x in (owner, along, points, new))
    return np.split(points, np.flatnonzero(np.diff(owner)) + 1)


def _following(owner: Int[np.ndarray, " points"]) -> Int[np.ndarray, " points"]:
    """The place of the next point of the same ring; rings follow each other."""
    first = np.searchsorted(owner, owner)
    following = np.arange(1, len(owner) + 1)
    last = np.append(np.diff(owner) != 0, True)
    return np.where(last, first, following)


def _steps(steps: np.ndarray, degrees: float | None) -> np.ndarray:
    """Steps between points; longitudes that jump go the shorter way around."""
    if degrees is None:
        steps[..., 0] = (steps[..., 0] + 180) % 360 - 180
    return steps


def _ground(points: np.ndarray) -> np.ndarray:
    return on_ellipsoid(points[..., 0], points[..., 1])


def _outline(points: Ring, degrees: float | None) -> Outline | None:
    if not np.isfinite(points).all():
        return None
    # A pole has any longitude: those of the points beside it.
    at = np.flatnonzero(np.abs(points[:, 1]) > 90 - 1e-9) if degrees is None else []
    if len(at) == 1:
        points = np.insert(np.roll(points, -at[0], axis=0), 0, points[at[0]], axis=0)
        points[:2, 0] = points[-1, 0], points[2, 0]
    steps = _steps(np.roll(points, -1, axis=0) - points, degrees)[:, 0]
    if len(at) == 1:
        steps[0] = -steps[1:].sum()  # the pole is on the ring, hence not inside
    longitude = points[0, 0] + np.concatenate([[0], np.cumsum(steps)])
    ring = np.column_stack([longitude[:-1], points[:, 1]])
    if round((longitude[-1] - longitude[0]) / 360):  # it goes around a pole
        pole = np.copysign(90.0, points[:, 1].mean())
        ring = np.vstack(
            [ring, [longitude[-1], points[0, 1]], [longitude[-1], pole],
             [longitude[0], pole]]
        )  # fmt: skip
    west, east = ring[:, 0].min(), ring[:, 0].max()
    first = int(np.floor((west + 180) / 360 + 1e-12))
    last = max(int(np.ceil((east + 180) / 360 - 1e-12)) - 1, first)
    parts = []
    for turn in range(first, last + 1):
        part = ring - [360.0 * turn, 0]
        if turn > first:
            part = _clipped(part, -180.0, 1)
        if turn < last:
            part = _clipped(part, 180.0, -1)
        if len(part) > 2:
            parts.append(_counterclockwise(part))
    return Outline(tuple(parts)) if parts else None


def _clipped(ring: Ring, limit: float, side: int) -> Ring:
    """What of a ring lies east (side 1) or west (-1) of a longitude."""
    inside = side * (ring[:, 0] - limit) >= 0
    found = []
    for here, point in enumerate(ring):
        before = ring[here - 1]
        if inside[here] != inside[here - 1]:
            part = (limit - before[0]) / (point[0] - before[0])
            found.append([limit, before[1] + part * (point[1] - before[1])])
        if inside[here]:
            found.append(point)
    return np.array(found).reshape(-1, 2)


def _counterclockwise(ring: Ring) -> Ring:
    x, y = (ring - ring[0]).T
    area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
    return ring if area > 0 else ring[::-1]


def _closed(ring: Ring) -> Ring:
    return np.vstack([ring, ring[:1]])


def _polygon(ring: Ring) -> bytes:
    points = _closed(ring)
    head = struct.pack("<BIII", LITTLE_ENDIAN, POLYGON, 1, len(points))
    return head + points.astype("<f8").tobytes()


def box_of(outlines: Sequence[Outline]) -> tuple[float, float, float, float] | None:
    """West, south, east, north of many; west is above east across the antimeridian."""
    if not outlines:
        return None
    boxes = np.array([outline.box for outline in outlines])
    west, south = boxes[:, :2].min(axis=0).tolist()
    east, north = boxes[:, 2:].max(axis=0).tolist()
    if any(outline.crosses for outline in outlines):
        rings = [ring[:, 0] for outline in outlines for ring in outline.rings]
        eastern = [ring.min() for ring in rings if ring.mean() > 0]
        western = [ring.max() for ring in rings if ring.mean() <= 0]
        if eastern and western and min(eastern) > max(western):
            west, east = float(min(eastern)), float(max(western))
    return west, south, east, north
