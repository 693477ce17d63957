"""Where rasters and their windows lie, as polygons of longitude and latitude.

Edges are divided before they are transformed, because a straight line of a CRS is
curved in another one. Longitudes run on across the antimeridian, so that a raster there
is one piece: 181 degrees east is 179 degrees west.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.data.geotiff_scene import Scene
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.errors import BadImageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Polygon = Float[np.ndarray, "points 2"]  # longitude, latitude in degrees

LEFT_OUT, USED, HELD_OUT = range(3)  # what becomes of a window
EDGE = 16  # parts of each edge


@dataclasses.dataclass(frozen=True, eq=False)
class Footprint:
    """One raster: its outline, and its windows as (polygon, what becomes of it).

    Neighbouring windows of one kind are one polygon.
    """

    name: str
    outline: Polygon
    windows: tuple[tuple[Polygon, int], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """West, south, east, north; east may be above 180."""
        (west, south), (east, north) = self.outline.min(axis=0), self.outline.max(0)
        return float(west), float(south), float(east), float(north)

    def moved(self, degrees: float) -> Footprint:
        """The footprint further east."""
        by = np.array([degrees, 0.0])
        windows = tuple((polygon + by, kind) for polygon, kind in self.windows)
        return Footprint(self.name, self.outline + by, windows)


def find_footprints(
    source: GeotiffSource, held_out: set[str] = frozenset()
) -> tuple[list[Footprint], dict[str, str]]:
    """The footprints of all rasters, and name -> reason of those with no place.

    held_out: ids of records that are not trained on, as those of the test part.
    """
    kinds = _kinds(source, held_out)
    missing, by_crs = {}, collections.defaultdict(list)
    for number, scene in enumerate(source.index.scenes):
        if scene.crs is None:
            missing[scene.entry.id] = "no CRS"
        elif scene.transform == (1, 0, 0, 0, 1, 0):
            missing[scene.entry.id] = "no geotransform"
        else:
            by_crs[scene.crs].append(number)
    found = {}
    for crs, numbers in by_crs.items():
        scenes = [source.index.scenes[number] for number in numbers]
        rectangles = [list(_rectangles(scene, kinds[scene])) for scene in scenes]
        try:
            rings = _placed(crs, scenes, rectangles)
        except BadImageError:
            # One call for all rasters of a CRS: all of them fail.
            missing |= {s.entry.id: "its CRS has no place on Earth" for s in scenes}
            continue
        for number, scene, boxes, polygons in zip(
            numbers, scenes, rectangles, rings, strict=True
        ):
            reason, outline = _continuous(polygons[0])
            if reason:
                missing[scene.entry.id] = reason
                continue
            windows = tuple(
                (_beside(polygon, outline), kind)
                for polygon, (_, kind) in zip(polygons[1:], boxes, strict=True)
            )
            found[number] = Footprint(scene.entry.id, outline, windows)
    return _together([found[number] for number in sorted(found)]), missing


def _kinds(
    source: GeotiffSource, held_out: set[str]
) -> dict[Scene, Int[np.ndarray, "down across"]]:
    """What becomes of the windows of each raster."""
    scenes = source.index.scenes
    kinds = [np.full(scene.valid.shape, LEFT_OUT) for scene in scenes]

    def mark(window, kind: int) -> None:
        scene, (top, left, _, _) = scenes[window.scene], window.box
        row, column = (
            np.searchsorted(scene.rows, top),
            np.searchsorted(scene.columns, left),
        )
        kinds[window.scene][row, column] = kind

    for i in range(len(source.index)):
        mark(source.index[i], HELD_OUT)  # unless it is one of the source
    for i in range(len(source)):
        if source.id(i) not in held_out:
            mark(source.window(i), USED)
    return dict(zip(scenes, kinds, strict=True))


def _rectangles(
    scene: Scene, kinds: Int[np.ndarray, "down across"]
) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """(top, left, bottom, right), kind; together they cover the raster."""
    same = (kinds[1:] == kinds[:-1]).all(axis=1)
    for first, last in _runs(~same):
        row = kinds[first]
        for start, end in _runs(row[1:] != row[:-1]):
            box = (
                scene.rows[first],
                scene.columns[start],
                scene.rows[last],
                scene.columns[end],
            )
            yield tuple(map(int, box)), int(row[start])


def _runs(changes: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run; changes[i]: i and i + 1 are in two runs."""
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(changes) + 1]
    return itertools.pairwise(edges)


def _placed(
    crs: str,
    scenes: Sequence[Scene],
    rectangles: Sequence[list[tuple[tuple[int, int, int, int], int]]],
) -> list[list[Polygon]]:
    """Polygons of each scene: its outline, then its rectangles."""
    from rasterio import warp

    points = []
    for scene, boxes in zip(scenes, rectangles, strict=True):
        a, b, c, d, e, f = scene.transform
        for box in [(0, 0, *scene.shape), *(box for box, _ in boxes)]:
            row, column = _edges(*box)
            points.append([a * column + b * row + c, d * column + e * row + f])
    x, y = np.concatenate(points, axis=1)
    with gdal.gdal(scenes[0].entry.path):
        places = np.array(warp.transform(crs, "EPSG:4326", x, y))
    polygons = iter(places.T.reshape(len(points), 4 * EDGE, 2))
    return [[next(polygons) for _ in range(1 + len(boxes))] for boxes in rectangles]


def _edges(
    top: int, left: int, bottom: int, right: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of points around a rectangle, from its first corner."""
    part = np.arange(EDGE) / EDGE
    rows, columns = top + (bottom - top) * part, left + (right - left) * part
    back, up = right - (right - left) * part, bottom - (bottom - top) * part
    full = np.ones(EDGE)
    return (
        np.concatenate([top * full, rows, bottom * full, up]),
        np.concatenate([columns, right * full, back, left * full]),
    )


def _continuous(polygon: Polygon) -> tuple[str, Polygon]:
    """A reason why it cannot be drawn, or ""; and the polygon without jumps."""
    if not np.isfinite(polygon).all():
        return "its CRS has no place on Earth there", polygon
    ring = np.unwrap([*polygon[:, 0], polygon[0, 0]], period=360)
    if abs(ring[-1] - ring[0]) > 180:
        return "it contains a pole", polygon
    return "", np.column_stack([ring[:-1], polygon[:, 1]])


def _beside(polygon: Polygon, outline: Polygon) -> Polygon:
    """A polygon without jumps, in the turn of the outline."""
    _, polygon = _continuous(polygon)
    apart = polygon[:, 0].mean() - outline[:, 0].mean()
    return polygon - [360 * np.round(apart / 360), 0]


def _together(footprints: list[Footprint]) -> list[Footprint]:
    """Moved by whole turns, so that the widest empty part of the Earth is outside."""
    if not footprints:
        return []
    centres = np.array([f.outline[:, 0].mean() for f in footprints])
    turned = np.sort(centres % 360)
    gaps = np.diff([*turned, turned[0] + 360])
    start = turned[(gaps.argmax() + 1) % len(turned)]
    wanted = start + (centres - start) % 360
    wanted -= 360 * np.round(wanted.mean() / 360)
    turns = 360 * np.round((wanted - centres) / 360)
    return [f.moved(by) if by else f for f, by in zip(footprints, turns, strict=True)]
