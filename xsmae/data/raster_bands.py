"""Which bands of a raster are data, what they are called, and which is alpha.

GDAL calls the fourth band of 8 bits alpha when nobody has said what it is, and then
takes it for a mask: near infrared would say which pixels are valid. So a band that is
called alpha is looked at, unless its format knows no other fourth band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.sensors import Sensor, band_key
from xsmae.errors import UserError, printable

if TYPE_CHECKING:
    import rasterio

# Formats whose fourth band is alpha by definition.
_ALPHA_FORMATS = ("PNG", "WEBP", "GIF", "BIGGIF")
_COLOURS = ("red", "green", "blue", "nir", "rededge", "swir", "cyan", "magenta")
_LOOKED_AT = 2**20  # pixels
# Of what is above 0 in an alpha band, this much is opaque; the rest are soft edges.
_OPAQUE = 0.9


@dataclasses.dataclass(frozen=True)
class BandPlan:
    """indexes: GDAL's, from 1, of the bands that are read. alpha: GDAL's index."""

    indexes: tuple[int, ...]
    names: tuple[str, ...]
    alpha: int | None
    notes: tuple[str, ...]


def plan_bands(
    dataset: rasterio.DatasetReader,
    *,
    given: Sequence[str] | None,
    sensor: Sensor | None,
    where: str,
) -> BandPlan:
    """Decide which bands are read, and their names.

    given: names that the raster has, by itself or by the sensor's order, to choose
    bands in that order; or else one name for each of its bands. UserError where they
    are neither, or where the names are not those of the sensor.
    """
    if given is not None:
        given = _checked(given, where)
    alpha, notes = _find_alpha(dataset, given)
    data = [i for i in dataset.indexes if i != alpha]
    if not data:
        raise UserError(f"{where}: its only band is alpha; expected a band of data")
    found = _names_of(dataset, data)
    if sensor is not None and given is not None:
        # Before choosing: 10 of the 13 bands of a file without names are found so.
        by_sensor = _fit_sensor(found, sensor)
        if by_sensor is not None:
            found, said = by_sensor
            notes += said
    names = found
    if given is not None:
        own = {band_key(name): i for name, i in zip(found, data, strict=True)}
        if len(own) == len(found) and all(band_key(name) in own for name in given):
            data, names = [own[band_key(name)] for name in given], given
        elif len(given) == len(data):
            names = given
        else:
            raise UserError(
                f"{where}: bands={','.join(given)} are {len(given)} names, but it has "
                f"{len(data)} bands of data ({','.join(found)}); give one name for "
                "each band, or names that it has"
            )
    if sensor is not None:
        names, said = _names_of_sensor(names, sensor, where)
        notes += said
    return BandPlan(tuple(data), tuple(names), alpha, tuple(notes))


def _checked(given: Sequence[str], where: str) -> list[str]:
    if isinstance(given, str):
        raise UserError(f"{where}: bands={given!r}; expected a sequence of names")
    names = [str(name).strip() for name in given]
    if not names or not all(names) or len({*map(band_key, names)}) < len(names):
        raise UserError(
            f"{where}: bands={list(given)}; expected names that differ, at least one"
        )
    return names


def _find_alpha(
    dataset: rasterio.DatasetReader, given: Sequence[str] | None
) -> tuple[int | None, list[str]]:
    from rasterio.enums import ColorInterp

    colours = dataset.colorinterp
    found = [i for i in dataset.indexes if colours[i - 1] == ColorInterp.alpha]
    if not found:
        return None, []
    band = found[-1]
    if given is not None and len(given) == dataset.count:
        name = printable(given[band - 1])
        return None, [f"band {band} is called alpha in the file; it is data: {name}"]
    if dataset.driver in _ALPHA_FORMATS:
        return band, []
    if _looks_like_alpha(dataset, band):
        return band, [f"band {band} is alpha: it is called so, and looks like a mask"]
    return None, [
        f"band {band} is called alpha in the file, but has the values of data: it is "
        "data; name it with bands="
    ]


def _looks_like_alpha(dataset: rasterio.DatasetReader, band: int) -> bool:
    """True unless the band has many values between nothing and the greatest."""
    greatest = _greatest(dataset.dtypes[band - 1])
    values = sample(dataset, band)
    above = values[values > 0]
    return not len(above) or (above >= greatest).mean() >= _OPAQUE


def _greatest(dtype: str) -> float:
    kind = np.dtype(dtype)
    return float(np.iinfo(kind).max) if kind.kind in "iu" else 1.0


def sample(dataset: rasterio.DatasetReader, band: int) -> np.ndarray:
    """The pixels of a small band; of a larger one, those of some blocks, always the
    same ones."""
    if dataset.width * dataset.height <= _LOOKED_AT:
        return dataset.read(band)
    height, width = dataset.block_shapes[band - 1]
    down, across = -(-dataset.height // height), -(-dataset.width // width)
    wanted = max(1, min(down * across, _LOOKED_AT // (height * width)))
    chosen = np.random.default_rng(0).choice(down * across, wanted, replace=False)
    blocks = [
        dataset.read(band, window=dataset.block_window(band, *divmod(int(i), across)))
        for i in sorted(chosen)
    ]
    return np.concatenate([block.ravel() for block in blocks])


def _names_of(dataset: rasterio.DatasetReader, data: Sequence[int]) -> list[str]:
    """Names by description, by colour, or band_1, band_2, ...; all differ."""
    names = []
    for i in data:
        description = (dataset.descriptions[i - 1] or "").strip()
        colour = dataset.colorinterp[i - 1].name.lower()
        names.append(description or (colour if colour in _COLOURS else ""))
    keys = [band_key(name) for name in names]
    return [
        name if name and keys.count(key) == 1 else f"band_{i}"
        for name, key, i in zip(names, keys, data, strict=True)
    ]


def _names_of_sensor(
    names: Sequence[str], sensor: Sensor, where: str
) -> tuple[list[str], list[str]]:
    found = _fit_sensor(names, sensor)
    if found is None:
        raise UserError(
            f"{where}: its bands are {','.join(names)}, those of {sensor.name} are "
            f"{','.join(sensor.bands)}; name or choose them with bands=..."
        )
    return found


def _fit_sensor(
    names: Sequence[str], sensor: Sensor
) -> tuple[list[str], list[str]] | None:
    """The sensor's names of bands, and notes; None where they are not its bands."""
    own = {band_key(name): name for name in sensor.bands}
    if all(band_key(name) in own for name in names):
        return [own[band_key(name)] for name in names], []
    named = [
        (name, expected)
        for name, expected in zip(names, sensor.bands, strict=False)
        if not name.startswith("band_")
    ]
    fits = all(band_key(name) == band_key(expected) for name, expected in named)
    if len(names) == len(sensor.bands) and fits:
        said = (
            f"bands are named in the order of {sensor.name}: {','.join(sensor.bands)}"
        )
        return list(sensor.bands), [said]
    return None
