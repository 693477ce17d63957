"""The chips of a scene: where they are, and how they are read.

Chips are windows of one size in a grid. The last one of each row and column is moved
back so that it ends with the scene: each pixel is in a chip, and no chip leaves the
scene.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.raster import Raster
from xsmae.errors import UserError
from xsmae.evaluation.reading import Reading
from xsmae.evaluation.segmentation.windows import window_starts
from xsmae.scenes.inputs import used_bands, varying_gsd

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from xsmae.scenes.inputs import GsdAt

PANEL = 2**24  # numbers that are read at a time, at least a chip: 64 MB of float32


@dataclasses.dataclass(frozen=True)
class Length:
    """A length in pixels, or in metres on the ground."""

    value: float
    metres: bool

    @classmethod
    def parse(cls, text: str, flag: str) -> Length:
        """224 (pixels) or 500m; UserError, which names the flag, for other texts."""
        found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", text.strip())
        if found is None or not float(found[1] or found[2]):
            raise UserError(
                f"{flag}={text}, expected pixels such as 224, or metres such as 500m"
            )
        return cls(float(found[1] or found[2]), found[1] is None)

    def pixels(self, gsd: tuple[float, float]) -> tuple[int, int]:
        """Along y and x."""
        if not self.metres:
            return int(self.value), int(self.value)
        return tuple(max(round(self.value / axis), 1) for axis in gsd)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The chips of a scene.

    size, stride: height and width in pixels. side: height and width that the encoder
    gets; other than `size` if chips are resampled. tops, lefts: where they begin.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    side: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of chips."""
        return len(self.tops), len(self.lefts)

    @property
    def resampled(self) -> bool:
        """True if the encoder gets other pixels than the scene has."""
        return self.size != self.side

    def places(
        self, rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, "n 2"]:
        """The first pixels of chips by their row and column in the grid."""
        return np.stack([np.array(self.tops)[rows], np.array(self.lefts)[columns]], 1)


def plan_grid(
    raster: Raster,
    *,
    chip_size: Length,
    stride: Length | None,
    side: int | None,
    patch_size: int,
    image_size: int,
) -> Grid:
    """The grid of a scene; UserError if it does not fit.

    stride: None: that of chips side by side. side: pixels that the encoder gets along
    an axis; None: the chip's own if `chip_size` is in pixels, else `image_size`.
    """
    # Without a GSD, lengths in pixels would do. The encoder needs it anyway.
    gsd = raster.known_gsd()
    size = chip_size.pixels(gsd)
    step = size if stride is None else stride.pixels(gsd)
    if side is not None:
        sides = (side, side)
    else:
        sides = (image_size, image_size) if chip_size.metres else size
    if any(x % patch_size for x in sides):
        what = "--size" if side is not None else "--chip_size"
        raise UserError(
            f"{what}={sides[0]}, expected a multiple of the patch size {patch_size}"
            + ("" if side is not None else ", or --size with one")
        )
    height, width = raster.shape
    if size[0] > height or size[1] > width:
        raise UserError(
            f"{height} x {width} pixels, smaller than a chip of {size[0]} x {size[1]}: "
            "give a smaller --chip_size; --size is what the encoder gets"
        )
    if step[0] > size[0] or step[1] > size[1]:
        raise UserError(
            f"--stride of {step[0]} x {step[1]} pixels leaves gaps between chips of "
            f"{size[0]} x {size[1]}: expected at most that"
        )
    axes = zip(raster.shape, size, step, strict=True)
    tops, lefts = (tuple(window_starts(*axis)) for axis in axes)
    return Grid(size, step, sides, tops, lefts)


def plan_tokens(
    raster: Raster, *, chip_size: Length, stride: Length | None, patch_size: int
) -> Grid:
    """The windows whose patches cover a scene; UserError if they do not fit.

    They begin at multiples of the patch. The last of each row and column may leave the
    scene by less than a patch.
    """
    raster.known_gsd()
    size, step = int(chip_size.value), int((stride or chip_size).value)
    for flag, value, length in (
        ("--chip_size", size, chip_size), ("--stride", step, stride),
    ):  # fmt: skip
        if length is not None and (length.metres or value % patch_size):
            raise UserError(
                f"{flag}={length.value:g}{'m' * length.metres}, expected pixels, a "
                f"multiple of the patch size {patch_size}, for --unit=token"
            )
    height, width = raster.shape
    if step > size or size > min(height, width):
        raise UserError(
            f"{height} x {width} pixels, --chip_size={size} and --stride={step}: "
            "expected a chip that fits in the scene, and a stride that fits in a chip"
        )
    whole = [-(-axis // patch_size) * patch_size for axis in raster.shape]
    tops, lefts = (tuple(window_starts(axis, size, step)) for axis in whole)
    return Grid((size, size), (step, step), (size, size), tops, lefts)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Neighbouring chips, to be read together: their rows and columns in the grid."""

    rows: range
    columns: range

    @property
    def chips(self) -> list[tuple[int, int]]:
        """Row and column of each."""
        return [(row, column) for row in self.rows for column in self.columns]


def panel_shape(grid: Grid, raster: Raster, bands: int) -> tuple[int, int]:
    """Rows and columns of the chips that are read together.

    About a square of `PANEL` numbers, so that few blocks are decoded for two panels; or
    one row of chips, where a block is as wide as the scene.
    """
    pixels = PANEL // bands
    height = width = math.isqrt(pixels)
    if raster.block_shape[1] >= raster.shape[1]:
        height, width = grid.size[0], pixels // grid.size[0]
    many = [
        max((most - size) // stride + 1, 1)
        for most, size, stride in zip(
            (height, width), grid.size, grid.stride, strict=True
        )
    ]
    return many[0], many[1]


def panels(grid: Grid, shape: tuple[int, int], rows: range) -> Iterator[Panel]:
    """The chips of some rows in panels of `shape`; a panel begins at the first row."""
    columns = grid.shape[1]
    for row in range(rows.start, rows.stop, shape[0]):
        for column in range(0, columns, shape[1]):
            yield Panel(
                range(row, min(row + shape[0], rows.stop)),
                range(column, min(column + shape[1], columns)),
            )


@dataclasses.dataclass(frozen=True)
class ChipReader:
    """Reads chips as the encoder takes them.

    gsd_at: the GSD at places, None if it is the same everywhere.
    """

    raster: Raster
    reading: Reading
    grid: Grid
    gsd_at: GsdAt | None

    @classmethod
    def of(cls, raster: Raster, reading: Reading, grid: Grid) -> ChipReader:
        """The reader of a raster."""
        return cls(raster, reading, grid, varying_gsd(raster))

    def read(
        self, panel: Panel
    ) -> tuple[Float[np.ndarray, "n height width bands"], Float[np.ndarray, " n"]]:
        """Chips in the encoder's units, and the valid part of each, 0 to 1.

        Pixels without a value are the mean of their band: 0 once normalised.
        """
        images, valid = self._read(panel)
        return images, valid.mean(axis=(1, 2), dtype=np.float32)

    def read_patches(
        self, panel: Panel, patch: int
    ) -> tuple[
        Float[np.ndarray, "n height width bands"], Float[np.ndarray, "n down across"]
    ]:
        """Chips as `read` gives them, and the valid part of each of their patches."""
        images, valid = self._read(panel)
        count, height, width = valid.shape
        valid = valid.reshape(count, height // patch, patch, width // patch, patch)
        return images, valid.mean(axis=(2, 4), dtype=np.float32)

    def _read(self, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
        """Chips, and which of their pixels are valid."""
        bands = used_bands(self.raster, self.reading)
        grid, (height, width) = self.grid, self.grid.size
        places = [(grid.tops[r], grid.lefts[c]) for r, c in panel.chips]
        if grid.resampled:
            found = [
                self.raster.read((top, left, height, width), grid.side, bands)
                for top, left in places
            ]
        else:
            (top, left), (bottom, right) = places[0], places[-1]
            window = (top, left, bottom + height - top, right + width - left)
            values, valid = self.raster.read(window, bands=bands)
            parts = [
                np.s_[y - top : y - top + height, x - left : x - left + width]
                for y, x in places
            ]
            found = [(values[part], valid[part]) for part in parts]
        images = np.stack([self._filled(values, valid) for values, valid in found])
        return images, np.stack([valid for _, valid in found])

    def _filled(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
        reading = self.reading
        if not valid.all():
            values = np.where(valid[..., None], values, np.float32(np.nan))
        if reading.filled:
            values = reading.bands.complete(values, reading.found)
        return values if valid.all() else reading.bands.fill(values)

    def gsd(self, places: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Metres per pixel of chips as the encoder gets them, along y and x."""
        size, side = (np.array(x, float) for x in (self.grid.size, self.grid.side))
        if self.gsd_at is None:
            native = np.broadcast_to(self.raster.known_gsd(), (len(places), 2))
        else:
            native = self.gsd_at(*(places + size / 2).T)
        return (native * (size / side)).astype(np.float32)
