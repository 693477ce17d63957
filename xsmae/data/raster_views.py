"""A window of a raster as an image, and the views that are cut from it in float32.

A view is resampled once, band by band, with the antialiasing that 8-bit images get. If
pixels of the ground that it shows have no value, it is the mean of those that have one,
weighted by a triangle: a bicubic filter has negative weights, which would invent values
beside the gap. A pixel of a view is valid if at least half of its weight is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from xsmae.data.picture import MARGIN

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from xsmae.data.raster import Raster

DTYPE = "float32"  # of the values of every raster


@dataclasses.dataclass(frozen=True, eq=False)
class FloatView:
    """A view of a raster: values [size, size, bands] and which pixels are valid."""

    values: Float[np.ndarray, "height width bands"]
    valid: Bool[np.ndarray, "height width"]

    def mirrored(self, *, vertical: bool, horizontal: bool) -> FloatView:
        """The view upside down, left to right, or both."""
        order = (slice(None, None, -1 if vertical else 1),)
        order += (slice(None, None, -1 if horizontal else 1),)
        return FloatView(self.values[order], self.valid[order])


@dataclasses.dataclass(frozen=True, eq=False)
class FloatPixels:
    """Values whose pixels each span (down, across) image pixels; (0, 0) is the corner.

    It has the method of `picture.Pixels`.
    """

    values: Float[np.ndarray, "height width bands"]
    valid: Bool[np.ndarray, "height width"]
    down: float = 1.0
    across: float = 1.0

    def cut(
        self,
        box: tuple[float, float, float, float],
        size: int,
        resample: Image.Resampling,
    ) -> FloatView:
        """The ground of `box` in size x size pixels; see the module.

        box: top, left, bottom, right in image pixels.
        """
        height, width = self.valid.shape
        top, left, bottom, right = box
        # Rounding may put an edge a hair outside, which Pillow refuses.
        box = (
            max(left / self.across, 0.0),
            max(top / self.down, 0.0),
            min(right / self.across, float(width)),
            min(bottom / self.down, float(height)),
        )

        def resize(plane: np.ndarray, how: Image.Resampling) -> np.ndarray:
            image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
            return np.asarray(image.resize((size, size), how, box=box))

        rows, columns = (
            _reached(low, high, size) for low, high in (box[1::2], box[0::2])
        )
        bands = range(self.values.shape[-1])
        if self.valid[rows, columns].all():
            planes = [resize(self.values[..., b], resample) for b in bands]
            return FloatView(np.stack(planes, -1), np.ones((size, size), bool))
        how = Image.Resampling.BILINEAR
        weight = resize(self.valid, how)
        valid = weight >= 0.5
        known = np.where(self.valid[..., None], self.values, 0)
        planes = [resize(known[..., b], how) for b in bands]
        safe = np.where(valid, weight, 1)[..., None]
        return FloatView(
            np.where(valid[..., None], np.stack(planes, -1) / safe, 0), valid
        )


def _reached(low: float, high: float, size: int) -> slice:
    """The pixels of an axis that a filter reads, which are more than the box's."""
    support = 2 * max((high - low) / size, 1.0)  # of Pillow's bicubic, the widest
    return slice(max(math.floor(low - support), 0), math.ceil(high + support))


@dataclasses.dataclass(frozen=True, eq=False)
class RasterImage:
    """A window of a raster, (top, left, height, width) in pixels, not read yet.

    group: windows that are read together with it, see `Raster.read`.
    """

    raster: Raster
    window: tuple[int, int, int, int]
    group: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and bands at full size."""
        return *self.window[2:], len(self.raster.bands)

    def read(
        self,
    ) -> tuple[
        Float[np.ndarray, "height width bands"], Bool[np.ndarray, "height width"]
    ]:
        """All values and which pixels are valid. Raises BadImageError."""
        return self.raster.read(self.window, group=self.group)

    def pixels(self, finest: float) -> FloatPixels:
        """Pixels for views whose pixels span `finest` image pixels or more.

        Where views are much coarser than the raster it is averaged first, from an
        overview if there is one. Raises BadImageError.
        """
        height, width = self.window[2:]
        step = finest / MARGIN
        if step < 2:
            return FloatPixels(*self.read())
        size = math.ceil(height / step), math.ceil(width / step)
        values, valid = self.raster.read(self.window, size=size, group=self.group)
        return FloatPixels(values, valid, height / size[0], width / size[1])
