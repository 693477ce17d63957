"""Metres on the ground between neighbouring pixels, whatever the CRS counts in.

Metres, feet, degrees, Web Mercator, rotated grids: the centres of neighbouring pixels
are placed on the ellipsoid, and their distance there is the GSD. The numbers in a
geotransform are never taken for metres.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.gsd import check_gsd
from xsmae.errors import UserError

if TYPE_CHECKING:
    import affine

# WGS 84: the larger half axis in metres, and the square of the eccentricity.
_AXIS, _ECCENTRICITY_2 = 6378137.0, 6.69437999014e-3

ANISOTROPY = 1.2  # pixels that are longer than that in one direction are reported
VARIATION = 1.05  # and a GSD that differs more than that within the raster


@dataclasses.dataclass(frozen=True)
class GroundSize:
    """gsd: metres per pixel along y and x, None if not known; notes: a line each."""

    gsd: tuple[float, float] | None
    notes: tuple[str, ...]


def ground_size(
    transform: affine.Affine,
    crs: str | None,
    rows: np.ndarray | float,
    columns: np.ndarray | float,
) -> np.ndarray:
    """Metres between the centres of neighbouring pixels, around places of a raster.

    rows, columns: places in pixels, 0.5 is the centre of the first. Returns float64
    [..., 2], along y and x; not finite where the CRS has no place on Earth.
    """
    from rasterio import warp

    rows, columns = np.broadcast_arrays(np.asarray(rows, float), columns)
    half = np.array([[-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]])  # y, then x
    row = rows[..., None] + half[:, 0]
    column = columns[..., None] + half[:, 1]
    x = (transform.a * column + transform.b * row + transform.c).ravel()
    y = (transform.d * column + transform.e * row + transform.f).ravel()
    longitude, latitude = warp.transform(crs, "EPSG:4326", x, y)
    places = on_ellipsoid(np.array(longitude), np.array(latitude))
    places = places.reshape(*row.shape, 3)
    return np.stack(
        [
            np.linalg.norm(places[..., 1, :] - places[..., 0, :], axis=-1),
            np.linalg.norm(places[..., 3, :] - places[..., 2, :], axis=-1),
        ],
        axis=-1,
    )


def on_ellipsoid(longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """Earth-centred x, y, z in metres, right at the poles and at the antimeridian too.

    The straight line between neighbours is the arc on the ground to 1e-5, up to 100 km.
    """
    longitude, latitude = np.radians(longitude), np.radians(latitude)
    # The radius of curvature in the prime vertical.
    radius = _AXIS / np.sqrt(1 - _ECCENTRICITY_2 * np.sin(latitude) ** 2)
    return np.stack(
        [
            radius * np.cos(latitude) * np.cos(longitude),
            radius * np.cos(latitude) * np.sin(longitude),
            radius * (1 - _ECCENTRICITY_2) * np.sin(latitude),
        ],
        axis=-1,
    )


def given_gsd(
    gsd: float | tuple[float, float] | None, where: str
) -> tuple[float, float] | None:
    """One number for both axes, or (y, x); UserError unless they are above 0."""
    if gsd is None:
        return None
    axes = tuple(gsd) if isinstance(gsd, (tuple, list, np.ndarray)) else (gsd, gsd)
    if len(axes) != 2:
        raise UserError(f"{where}: gsd={gsd!r}; expected a number or (y, x), in metres")
    return check_gsd(axes[0], where), check_gsd(axes[1], where)


def find_gsd(
    transform: affine.Affine,
    crs: str | None,
    shape: tuple[int, int],
    *,
    given: tuple[float, float] | None,
    has_points: bool,
) -> GroundSize:
    """The GSD at the centre of a raster, and what there is to say of it.

    given: by the user, which counts. has_points: there are ground control points.
    """
    measured, notes = _measured(transform, crs, shape, has_points)
    if given is not None:
        if measured is not None and not np.allclose(given, measured, rtol=0.01):
            notes.append(
                f"GSD {_shown(given)} m as given; its CRS says {_shown(measured)} m"
            )
        measured = given
    if measured is not None and max(measured) / min(measured) > ANISOTROPY:
        notes.append(
            f"pixels of {_shown(measured)} m (y x x): "
            f"{max(measured) / min(measured):.2f} times longer in one direction"
        )
    return GroundSize(measured, tuple(notes))


def _measured(
    transform: affine.Affine,
    crs: str | None,
    shape: tuple[int, int],
    has_points: bool,
) -> tuple[tuple[float, float] | None, list[str]]:
    if crs is None or transform.is_identity or transform.is_degenerate:
        missing = "CRS" if crs is None else "geotransform"
        points = ", only ground control points" if has_points else ""
        return None, [f"no {missing}{points}: the GSD is not known"]
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    height, width = shape
    # The centre, then the middle of each side's pixels.
    rows = np.array([height / 2, 0.5, height - 0.5, height / 2, height / 2])
    columns = np.array([width / 2, width / 2, width / 2, 0.5, width - 0.5])
    try:
        sizes = ground_size(transform, crs, rows, columns)
    except (RasterioError, CPLE_BaseError) as error:  # a CRS that is none of Earth's
        text = " ".join(str(error).split())[:100]
        return None, [f"its CRS cannot be placed on Earth ({text}): GSD not known"]
    centre = tuple(map(float, sizes[0]))
    if not (np.isfinite(centre).all() and min(centre) > 0):
        return None, ["its CRS has no place on Earth there: the GSD is not known"]
    known = sizes[np.isfinite(sizes).all(axis=1) & (sizes > 0).all(axis=1)]
    notes = []
    if (known.max(axis=0) / known.min(axis=0)).max() > VARIATION:
        low, high = known.min(), known.max()
        notes.append(
            f"GSD {_shown(centre)} m at the centre; it is {low:.4g} to {high:.4g} m "
            "within the raster"
        )
    return centre, notes


def _shown(gsd: tuple[float, float]) -> str:
    return f"{gsd[0]:.4g} x {gsd[1]:.4g}"
