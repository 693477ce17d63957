"""The bands of images, and the only place that normalises them.

Images are stored as digital numbers (uint8, 0 to 255). Mean and standard deviation
describe the numbers divided by 255, that is values in 0-1. Images of float32 are
stored in the units of mean and standard deviation, and may lack pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

UNITS = "digital numbers 0-255 divided by 255"  # of every 8-bit image
BANDS = ("red", "green", "blue")  # of every decoded image, in this order
# How red, green and blue are called, in names and in numbers of sensors.
TRUE_COLOUR = (BANDS, ("B04", "B03", "B02"), ("B4", "B3", "B2"))

# Names of one band in both conventions. `B4` is near infrared in some Landsat files.
SAME = tuple(zip(*TRUE_COLOUR[:2], strict=True))

WHITE = 255.0  # the largest 8-bit number, which is the value 1
# The dtypes of stored images, and the units that they have if none are given.
STORED = {"uint8": UNITS, "float32": "as stored"}


@dataclasses.dataclass(frozen=True)
class Bands:
    """The bands of images in order, and the conversion of values to network input.

    mean, std: one number per band, for values in 0-1; for float32, for stored values.
    units: the units of mean and std, in words. dtype: the dtype of stored images.
    wavelengths: the central one of each band in nm, None where it is unknown; () if
    all are. shown: three bands for figures; (): true colour.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    units: str = UNITS
    dtype: str = "uint8"
    wavelengths: tuple[float | None, ...] = ()
    shown: tuple[str, ...] = ()

    def __post_init__(self):
        if self.dtype not in STORED:
            raise UserError(
                f"dtype={self.dtype!r} of the images, expected {' or '.join(STORED)}"
            )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Bands:
        """The `bands`, `mean` and `std` of a config or an encoder.json.

        Its `units`, `dtype` and `wavelengths` are read where it has them.
        """
        given = {name: fields.get(name) for name in ("units", "dtype")}
        given = {name: value for name, value in given.items() if value is not None}
        units = STORED.get(given.get("dtype"), UNITS)
        numbers = (tuple(fields[name]) for name in ("bands", "mean", "std"))
        waves = known_or_empty(fields.get("wavelengths") or ())
        return cls(*numbers, wavelengths=waves, **{"units": units, **given})

    @property
    def has_valid(self) -> bool:
        """True if batches of such images say which pixels are valid."""
        return self.dtype == "float32"

    def rescale(
        self, images: Shaped[Array, "*batch bands"]
    ) -> Float[Array, "*batch bands"]:
        """Stored values as float32 in the units of `mean`: of uint8, in 0-1."""
        if self.dtype == "float32":
            return images.astype(np.float32)
        return images.astype(np.float32) / WHITE

    def normalize(
        self, images: Shaped[Array, "*batch bands"]
    ) -> Float[Array, "*batch bands"]:
        """float32 values with zero mean and unit variance; NumPy or JAX arrays.

        images: as stored, or floating numbers in the units of `mean`.
        """
        # Use the arrays' own namespace: this module must import without JAX.
        xp = images.__array_namespace__()
        mean, std = (xp.asarray(x, dtype=xp.float32) for x in (self.mean, self.std))
        if self.dtype != "float32" and images.dtype == self.dtype:
            # This saves one pass over the images compared with `rescale`.
            mean, std = WHITE * mean, WHITE * std
        axes = (1,) * (images.ndim - 1)
        mean, std = mean.reshape(*axes, -1), std.reshape(*axes, -1)
        return (images.astype(xp.float32) - mean) / std

    def denormalize(
        self, images: Float[np.ndarray, "*batch bands"]
    ) -> Float[np.ndarray, "*batch bands"]:
        """Undoes `normalize`: float32 values in the units of `mean`."""
        images = np.asarray(images, np.float32)
        return images * np.float32(self.std) + np.float32(self.mean)

    def colours(self) -> tuple[int, int, int]:
        """The places of `shown`; else of red, green and blue; else of the first three.

        Of fewer than three bands it is the first one, three times: grey.
        """
        for names in (self.shown, *TRUE_COLOUR) if self.shown else TRUE_COLOUR:
            if set(names) <= set(self.names):
                return tuple(self.places(names))
        return (0, 1, 2) if len(self.names) > 2 else (0, 0, 0)

    def places(self, names: Sequence[str]) -> list[int]:
        """The index of each of `names` in these bands; ValueError if one is missing."""
        return [list(self.names).index(name) for name in names]

    def find(self, names: Sequence[str]) -> list[int | None]:
        """The index of each of these bands in `names`; None where it is missing.

        Bands of rasters may have the other name in `SAME`.
        """
        known = {name: index for index, name in enumerate(names)}
        pairs = SAME if self.dtype != "uint8" else ()
        other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        return [known.get(name, known.get(other.get(name))) for name in self.names]

    def fill(
        self, images: Float[Array, "*batch bands"]
    ) -> Float[Array, "*batch bands"]:
        """NaN, for pixels without a value, as the mean of its band: 0 once normalised.

        images: in the units of `mean`; NumPy or JAX arrays.
        """
        xp = images.__array_namespace__()
        mean = xp.asarray(self.mean, dtype=xp.float32)
        mean = mean.reshape((1,) * (images.ndim - 1) + (-1,))
        return xp.where(xp.isnan(images), mean, images)

    def complete(
        self, images: Shaped[np.ndarray, "*batch some"], names: Sequence[str]
    ) -> Float[np.ndarray, "*batch bands"]:
        """All bands in the units of `mean`, from images of `names`.

        images: as stored, or floating numbers in the units of `mean`. The other bands
        get their mean.
        """
        stored = images.dtype == self.dtype
        whole = np.tile(np.float32(self.mean), (*images.shape[:-1], 1))
        whole[..., self.places(names)] = self.rescale(images) if stored else images
        return whole


def known_or_empty(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """The values, or () if none is known."""
    return tuple(values) if any(value is not None for value in values) else ()
