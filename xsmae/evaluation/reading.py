"""How an encoder reads images: which of their bands, in which units."""

from __future__ import annotations

import dataclasses

import numpy as np

from xsmae.bands import BANDS, UNITS, WHITE, Bands
from xsmae.data.records import Source
from xsmae.errors import UserError

# What to do if the encoder reads bands that the images lack.
MISSING_BANDS = ("refuse", "mean")


@dataclasses.dataclass(frozen=True)
class Kind:
    """The bands, dtype and units of the images of a source; by default 8-bit RGB."""

    bands: tuple[str, ...] = BANDS
    dtype: str = "uint8"
    units: str = UNITS

    @classmethod
    def of(cls, source: Source | None) -> Kind:
        """The kind of a source's images; None means 8-bit RGB."""
        if source is None:
            return cls()
        return cls(tuple(source.bands), source.dtype, source.units)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Images of `kind`, as an encoder of `bands` reads them.

    places: for each band of the encoder its index in the images, None if they lack it.
    """

    bands: Bands
    kind: Kind
    places: tuple[int | None, ...]

    @property
    def used(self) -> tuple[str, ...]:
        """The images' names of the bands that are read, in the encoder's order."""
        return tuple(self.kind.bands[i] for i in self.places if i is not None)

    @property
    def found(self) -> tuple[str, ...]:
        """The encoder's bands that the images have."""
        pairs = zip(self.bands.names, self.places, strict=True)
        return tuple(name for name, place in pairs if place is not None)

    @property
    def filled(self) -> tuple[str, ...]:
        """The bands that the images lack, which get their mean."""
        return tuple(name for name in self.bands.names if name not in self.found)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [n, height, width, bands] of the kind, as the encoder takes them.

        8-bit images of its bands stay as they are. Others become float32 in its units,
        with the mean of a band that is missing or where a pixel has no value.
        """
        own = self.places == tuple(range(len(self.kind.bands)))
        if self.kind.dtype == "uint8" and self.bands.dtype == "uint8" and own:
            return images
        if self.kind.dtype == "uint8" and self.bands.dtype != "uint8":
            images = images / np.float32(WHITE)
        images = images[..., [place for place in self.places if place is not None]]
        return self.bands.fill(self.bands.complete(images, self.found))

    def describe(self) -> str:
        """How images are normalised, in words."""
        mean, std = list(self.bands.mean), list(self.bands.std)
        rest = f", {', '.join(self.filled)} at their mean" * bool(self.filled)
        if self.kind.dtype == self.bands.dtype == "uint8":
            return f"(x / 255 - {mean}) / {std}{rest}"
        x = "x / 255" if self.kind.dtype == "uint8" else "x"
        bands = ", ".join(
            used if used == name else f"{used} as {name}"
            for used, name in zip(self.used, self.found, strict=True)
        )
        return (
            f"({x} - {mean}) / {std} of {bands}{rest}, {self.bands.units}, 0 where a "
            "pixel has no value"
        )


def read_by(name: str, bands: Bands, kind: Kind, *, missing_bands: str) -> Reading:
    """How the encoder `name`, which reads `bands`, reads images of `kind`.

    Rasters may have more bands than the encoder reads. missing_bands: one of
    `MISSING_BANDS`. Raises UserError if the units differ, or if bands are missing and
    `missing_bands` is `refuse`.
    """
    _check_units(name, bands, kind)
    reading = Reading(bands, kind, tuple(bands.find(kind.bands)))
    what = (
        f"{name} reads the bands {', '.join(bands.names)}, images have "
        f"{', '.join(kind.bands)}"
    )
    lacking = [band for band in kind.bands if band not in reading.used]
    if lacking and (kind.dtype == "uint8" or not reading.used):
        raise UserError(
            f"{what}: expected an encoder with {', '.join(lacking)}; if it has them "
            "under other names, rename them in its encoder.json"
        )
    if reading.filled and missing_bands == "refuse":
        raise UserError(
            f"{what}: give --missing_bands=mean to fill the other "
            f"{len(reading.filled)} with their mean, or an encoder that reads only the "
            "images' bands"
        )
    return reading


def _check_units(name: str, bands: Bands, kind: Kind) -> None:
    """Raise UserError if the encoder's values and the images' are not the same thing.

    8-bit images are digital numbers, whatever the encoder calls them.
    """
    if kind.dtype == bands.dtype == "uint8" or kind.units == bands.units:
        return
    images = "8-bit images" if kind.dtype == "uint8" else f"{kind.dtype} rasters"
    wanted = "8-bit images" if bands.dtype == "uint8" else f"{bands.dtype} rasters"
    fix = "give an encoder of such values, or images that it was trained for"
    if kind.dtype == bands.dtype:
        fix = (
            "give the sensor, or scale and offset, that it was trained with, or "
            "another encoder"
        )
    raise UserError(
        f"{name} reads {wanted} ({bands.units}), but these are {images} "
        f"({kind.units}): {fix}"
    )
