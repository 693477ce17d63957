"""What a network reads of a scene: its bands, the GSD of its windows, its time."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.bands import Bands
from xsmae.data import gdal
from xsmae.data.gdal import Name
from xsmae.data.geotiff_source import units_of
from xsmae.data.raster import Raster
from xsmae.data.raster_gsd import ground_size
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.reading import Kind, Reading, read_by

if TYPE_CHECKING:
    from jaxtyping import Float

    # Rows and columns of the centres of windows -> [n, 2], metres along y and x.
    GsdAt = Callable[[np.ndarray, np.ndarray], Float[np.ndarray, "n 2"]]

GSD_TOLERANCE = 0.01  # windows have GSDs of their own where these differ by more


def reading_of(name: str, bands: Bands, raster: Raster, missing_bands: str) -> Reading:
    """How a network of `bands` reads the raster; UserError if it cannot.

    name: of the network, in messages. missing_bands: one of `MISSING_BANDS`.
    """
    unnamed = any(band.startswith("band_") for band in raster.bands)
    if unnamed and missing_bands == "refuse" and None in bands.find(raster.bands):
        raise UserError(
            f"{name} reads the bands {', '.join(bands.names)}, the scene has "
            f"{', '.join(raster.bands)}: give the names of all its bands, in order, "
            "with --bands"
        )
    kind = Kind(raster.bands, "float32", units_of(raster))
    return read_by(name, bands, kind, missing_bands=missing_bands)


def used_bands(raster: Raster, reading: Reading) -> list[str]:
    """The names of the raster's bands that are read, in the network's order."""
    return list(reading.used) or list(raster.bands)


def varying_gsd(raster: Raster) -> GsdAt | None:
    """The GSD at places of a raster; None if it is the same everywhere, or only given.

    A GSD that the user gave is that of the centre, and changes as the CRS says.
    """
    if raster.crs is None or raster.transform.is_identity:
        return None

    def measured(rows, columns):
        with gdal.gdal(raster.path):
            return ground_size(raster.transform, raster.crs, rows, columns)

    height, width = raster.shape
    rows, columns = np.meshgrid(*(np.linspace(0.5, s - 0.5, 5) for s in raster.shape))
    try:
        centre = measured(height / 2, width / 2)
        ratios = measured(rows, columns) / centre
    except BadImageError:  # a CRS that is none of Earth's
        return None
    same = np.allclose(ratios, 1, atol=GSD_TOLERANCE)
    if same or not np.isfinite(ratios).all() or not (ratios > 0).all():
        return None
    return lambda rows, columns: measured(rows, columns) / centre * raster.gsd


def facts_of(raster: Raster) -> list[Any]:
    """What decides the values of a raster, for digests; JSON."""
    # Other programs add these beside a scene, which changes no value of it.
    files = [n for n in raster.files if not n.endswith((".aux.xml", ".ovr"))]
    path = raster.path if raster.stamp is None else None  # it may have moved
    return [
        path, raster.stamp, raster.shape, raster.crs, raster.transform[:6],
        raster.bands, raster.known_gsd(), raster.scale, raster.offset,
        [str(x) for x in raster.nodata], [gdal.stamp_of(name) for name in files],
    ]  # fmt: skip


def parse_times(text: str) -> tuple[datetime.datetime, datetime.datetime | None]:
    """A time, or the start and end of an interval, START/END; UserError.

    Of ISO 8601, in UTC unless it says another zone. A day as END includes that day.
    """
    start, *rest = text.split("/")
    try:
        times = _time(start), *(_time(end, ends=True) for end in rest)
    except (ValueError, OverflowError):
        times = ()
    if len(times) not in (1, 2):
        raise UserError(
            f"--datetime={text}, expected a time such as 2020-08-31 or "
            "2020-08-31T10:56:21Z, or an interval such as 2020-06-01/2020-08-31"
        )
    if len(times) == 1:
        return times[0], None
    if times[1] < times[0]:
        raise UserError(f"--datetime={text} ends before it starts: expected START/END")
    return times


def _time(text: str, *, ends: bool = False) -> datetime.datetime:
    """In UTC; `ends`: of a day, its last second."""
    found = datetime.datetime.fromisoformat(text)
    if ends and _is_day(text):
        found += datetime.timedelta(days=1, seconds=-1)
    if found.tzinfo is None:
        return found.replace(tzinfo=datetime.UTC)
    return found.astimezone(datetime.UTC)


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def time_of(raster: Raster) -> datetime.datetime | None:
    """When the image was taken, as its file says; None if it does not.

    GDAL's ACQUISITIONDATETIME, else TIFF's DateTime, which some programs set to the
    time of writing.
    """
    with gdal.borrowed(Name(raster.path, None, raster.stamp)) as dataset:
        taken = dataset.tags(ns="IMAGERY").get("ACQUISITIONDATETIME")
        written = dataset.tags().get("TIFFTAG_DATETIME")
    for text, pattern in (
        (taken, "%Y-%m-%d %H:%M:%S"),
        (written, "%Y:%m:%d %H:%M:%S"),
    ):
        try:
            time = datetime.datetime.strptime(text or "", pattern)
        except ValueError:
            continue
        return time.replace(tzinfo=datetime.UTC)
    return None
