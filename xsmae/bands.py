"""The bands of images, and the only place that normalises them.

Images are stored as digital numbers (uint8, 0 to 255). Mean and standard deviation
describe the numbers divided by `scale`, that is values in 0-1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

BANDS = ("red", "green", "blue")  # the bands of every decoded image, in order


@dataclasses.dataclass(frozen=True)
class Bands:
    """The bands of images in order, and the conversion of values to network input.

    mean, std: one number per band, for values in 0-1. units: the units of mean and std,
    in words. dtype: the dtype of stored images. scale: divides stored values to bring
    them into 0-1.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    units: str = "digital numbers 0-255 divided by 255"
    dtype: str = "uint8"
    scale: float = 255.0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Bands:
        """Reads `bands`, `mean` and `std` of a config or an encoder.json."""
        return cls(*(tuple(fields[name]) for name in ("bands", "mean", "std")))

    def rescale(
        self, images: Shaped[Array, "*batch bands"]
    ) -> Float[Array, "*batch bands"]:
        """Stored values as float32 in 0-1, not normalised."""
        return images.astype(np.float32) / self.scale

    def normalize(
        self, images: Shaped[Array, "*batch bands"]
    ) -> Float[Array, "*batch bands"]:
        """float32 values with zero mean and unit variance; NumPy or JAX arrays.

        images: stored values, or floating-point numbers in 0-1.
        """
        # Use the arrays' own namespace: this module must import without JAX.
        xp = images.__array_namespace__()
        mean, std = (xp.asarray(x, dtype=xp.float32) for x in (self.mean, self.std))
        if images.dtype == self.dtype:
            # This saves one pass over the images compared with `rescale`.
            mean, std = self.scale * mean, self.scale * std
        axes = (1,) * (images.ndim - 1)
        mean, std = mean.reshape(*axes, -1), std.reshape(*axes, -1)
        return (images.astype(xp.float32) - mean) / std

    def denormalize(
        self, images: Float[np.ndarray, "*batch bands"]
    ) -> Float[np.ndarray, "*batch bands"]:
        """Undoes `normalize`: float32 values, nominally in 0-1."""
        images = np.asarray(images, np.float32)
        return images * np.float32(self.std) + np.float32(self.mean)

    def places(self, names: Sequence[str]) -> list[int]:
        """The index of each of `names` in these bands; ValueError if one is missing."""
        return [list(self.names).index(name) for name in names]

    def complete(
        self, images: Shaped[np.ndarray, "*batch some"], names: Sequence[str]
    ) -> Float[np.ndarray, "*batch bands"]:
        """All bands in 0-1, from stored images of `names`; the rest get their mean."""
        whole = np.tile(np.float32(self.mean), (*images.shape[:-1], 1))
        whole[..., self.places(names)] = self.rescale(images)
        return whole
