"""Small pictures of chips, read from their scenes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.bands import TRUE_COLOUR
from xsmae.data.raster import Raster, open_raster
from xsmae.data.raster_bands import band_key
from xsmae.errors import BadImageError, UserError, printable
from xsmae.scenes.hits import Chip

if TYPE_CHECKING:
    from jaxtyping import UInt8

SIDE = 160  # pixels, at most
LOOKED_AT = 64  # chips of a scene that decide about black and white
EMPTY = 217  # the grey of pixels without a value


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A chip in colour; if it cannot be read, image is None and `reason` says why."""

    image: UInt8[np.ndarray, "height width 3"] | None
    reason: str = ""


def read_pictures(chips: Sequence[Chip]) -> list[Picture]:
    """The pictures of chips, in order.

    True colour where bands are named so, else the first three bands, or the first one.
    8-bit scenes are shown as they are. Black and white of others are the 2nd and the
    98th percentile of a band in the scene's chips.
    """
    found: list[Picture] = [Picture(None)] * len(chips)
    for source in dict.fromkeys(chip.source for chip in chips):
        places = [i for i, chip in enumerate(chips) if chip.source == source]
        pictures = _of_scene(source, [chips[i] for i in places])
        for i, picture in zip(places, pictures, strict=True):
            found[i] = picture
    return found


def read_scene(source: str, shape: tuple[int, int], side: int) -> Picture:
    """The picture of a whole scene, with at most `side` pixels along an axis.

    shape: the height and width that the scene should have.
    """
    try:
        with _opened(source) as (raster, bytes_):
            if raster.shape != tuple(shape):
                rows, columns = raster.shape
                return Picture(
                    None, f"it has {rows} x {columns} pixels: it is another one now"
                )
            shrink = min(side / max(shape), 1)
            size = tuple(max(round(x * shrink), 1) for x in shape)
            window = (0, 0, *shape)
            part = raster.read(window, None if shrink == 1 else size, _shown(raster))
            return _picture(part, (0.0, 1.0) if bytes_ else _limits([part]))
    except (UserError, BadImageError) as error:
        return Picture(None, _reason(error, source))


def _of_scene(source: str, chips: Sequence[Chip]) -> list[Picture]:
    try:
        with _opened(source) as (raster, bytes_):
            return _read(raster, chips, stretched=not bytes_)
    except (UserError, BadImageError) as error:
        return [Picture(None, _reason(error, source))] * len(chips)


@contextlib.contextmanager
def _opened(source: str) -> Iterator[tuple[Raster, bool]]:
    """A scene whose values are only shown, and if they are 8-bit."""
    try:
        with open_raster(source) as raster:
            bytes_ = raster.dtype == "uint8"
        # Units do not matter to a picture, and some files do not say them.
        options = {} if bytes_ else {"scale": 1.0, "offset": 0.0}
    except (UserError, BadImageError):
        bytes_, options = False, {"scale": 1.0, "offset": 0.0}
    with open_raster(source, **options) as raster:
        yield raster, bytes_


def _read(raster: Raster, chips: Sequence[Chip], *, stretched: bool) -> list[Picture]:
    bands = _shown(raster)
    found = []
    for start in range(0, len(chips), LOOKED_AT):
        parts = [_window(raster, c, bands) for c in chips[start : start + LOOKED_AT]]
        if not start:
            limits = _limits(parts) if stretched else (0.0, 1.0)
        found += [_picture(part, limits) for part in parts]
    return found


def _window(raster, chip, bands):
    """Values and validity, or the reason why there are none."""
    rows, columns = raster.shape
    if chip.row + chip.height > rows or chip.col + chip.width > columns:
        return f"the scene has only {rows} x {columns} pixels: it is another one now"
    shrink = min(SIDE / max(chip.height, chip.width), 1)
    size = tuple(max(round(x * shrink), 1) for x in (chip.height, chip.width))
    try:
        window = (chip.row, chip.col, chip.height, chip.width)
        return raster.read(window, None if shrink == 1 else size, bands)
    except (UserError, BadImageError) as error:
        return _reason(error, raster.path)


def _shown(raster: Raster) -> list[str]:
    """The bands for red, green and blue, or one band for grey."""
    own = {band_key(name): name for name in raster.bands}
    for names in TRUE_COLOUR:
        keys = [band_key(name) for name in names]
        if all(key in own for key in keys):
            return [own[key] for key in keys]
    return list(raster.bands[: 3 if len(raster.bands) > 2 else 1])


def _limits(parts) -> tuple[np.ndarray, np.ndarray]:
    """The values of black and white of each band."""
    values = [x[0][x[1]] for x in parts if not isinstance(x, str)]
    values = np.concatenate(values) if values else np.zeros((0, 1))
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return np.zeros(1), np.ones(1)
    low, high = np.percentile(values, [2, 98], axis=0)
    return low, np.where(high > low, high, low + 1)


def _picture(part, limits) -> Picture:
    if isinstance(part, str):
        return Picture(None, part)
    values, valid = part
    low, high = limits
    values = np.nan_to_num((values - low) / (np.subtract(high, low)))
    image = np.rint(255 * values.clip(0, 1)).astype(np.uint8)
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return Picture(np.where(valid[..., None], image, np.uint8(EMPTY)))


def _reason(error: Exception, source: str) -> str:
    text = printable(" ".join(str(error).split()))
    return text.removeprefix(printable(source)).removeprefix(":").strip()
