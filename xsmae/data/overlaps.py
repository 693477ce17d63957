"""Where images lie on the ground, and which of two parts overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xsmae.data import gdal
from xsmae.data.raster import Raster
from xsmae.errors import BadImageError, UserError

# Of the smaller image. Neighbours that share an edge overlap less, by rounding.
SHARE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Quadrilateral:
    """corners: float64 [4, 2], x and y in the CRS, around the image."""

    id: str
    crs: str
    corners: np.ndarray


def quadrilateral_of(raster: Raster, name: str) -> Quadrilateral | None:
    """The corners of a raster; None if no CRS or transform places it."""
    if raster.crs is None or raster.transform.is_identity:
        return None
    height, width = raster.shape
    places = [(0, 0), (width, 0), (width, height), (0, height)]
    corners = np.array([raster.transform @ place for place in places])
    return Quadrilateral(name, raster.crs, corners)


def overlaps(
    first: Sequence[Quadrilateral], second: Sequence[Quadrilateral]
) -> list[tuple[str, str, float]]:
    """Pairs of ids that overlap, and the overlap as a part of the smaller image.

    Quadrilaterals in several CRS are compared in that of the first one of a pair.
    """
    found = []
    for crs in dict.fromkeys(f.crs for f in first):
        here = [f for f in first if f.crs == crs]
        there = [_in_crs(f, crs) for f in second]
        low, high = (np.array([f(c, axis=0) for c in there]) for f in (np.min, np.max))
        for one in here:
            near = (low < one.corners.max(axis=0)) & (high > one.corners.min(axis=0))
            for place in np.flatnonzero(near.all(axis=1)):
                other = there[place]
                smaller = min(_area(one.corners), _area(other))
                share = _area(_clipped(other, one.corners)) / smaller
                if share > SHARE:
                    found.append((one.id, second[place].id, float(share)))
    return found


def _in_crs(quadrilateral: Quadrilateral, crs: str) -> np.ndarray:
    """The corners in another CRS, with points on the sides between them."""
    if quadrilateral.crs == crs:
        return quadrilateral.corners
    corners = quadrilateral.corners
    steps = np.arange(0, 1, 1 / 8)[:, None]
    sides = zip(corners, np.roll(corners, -1, axis=0), strict=True)
    points = np.concatenate([a + (b - a) * steps for a, b in sides])
    try:
        with gdal.gdal(quadrilateral.id):
            from rasterio import warp

            return np.column_stack(warp.transform(quadrilateral.crs, crs, *points.T))
    except BadImageError as error:
        raise UserError(f"{error}: its CRS {quadrilateral.crs} to {crs}") from None


def _area(corners: np.ndarray) -> float:
    """The area of a polygon, by the shoelace formula."""
    if len(corners) < 3:
        return 0.0
    x, y = (corners - corners[0]).T  # large coordinates would cost digits
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _clipped(polygon: np.ndarray, convex: np.ndarray) -> np.ndarray:
    """The part of a polygon inside a convex one (Sutherland and Hodgman)."""
    x, y = (convex - convex[0]).T
    turn = np.sign(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    for start, end in zip(convex, np.roll(convex, -1, axis=0), strict=True):
        if not len(polygon):
            break
        (along_x, along_y), (px, py) = end - start, (polygon - start).T
        side = turn * (along_x * py - along_y * px)
        kept = []
        for i, point in enumerate(polygon):
            before = i - 1
            if (side[before] >= 0) != (side[i] >= 0):
                part = side[before] / (side[before] - side[i])
                kept.append(polygon[before] + part * (point - polygon[before]))
            if side[i] >= 0:
                kept.append(point)
        polygon = np.array(kept).reshape(-1, 2)
    return polygon
