"""What the numbers of a raster mean: value = number * scale + offset.

| numbers                           | values                                        |
|-----------------------------------|-----------------------------------------------|
| 8 bits without sign               | number / 255                                  |
| 16 bits                           | with a scale: from the file, from a sensor's  |
|                                   | preset, or given                              |
| fewer bits than they take (NBITS) | number / the greatest that NBITS allow        |
| floating-point                    | as they are, unless the file has a scale or   |
|                                   | one is given                                  |
| 8 bits with sign, 32 and 64 bits  | with a scale from the file, or given          |
| complex, indices of colour tables | refused                                       |

A number on the wrong scale costs more than an error does: nothing is guessed. The file
and the preset must agree; what is given counts before both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.raster_bands import BandPlan
from xsmae.data.sensors import Sensor
from xsmae.errors import UserError

if TYPE_CHECKING:
    import rasterio

_HELP = "give scale= and offset= (value = number * scale + offset), or sensor="


@dataclasses.dataclass(frozen=True)
class Values:
    """scale, offset: one number for each band that is read."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    notes: tuple[str, ...]

    def of(self, numbers: np.ndarray, bands: Sequence[int]) -> np.ndarray:
        """float32 [h, w, bands] of numbers [bands, h, w] as they are stored.

        bands: their places in `scale`. Numbers beyond float32 are infinite.
        """
        # float32 holds 16 bits exactly, 32 it does not.
        exact = numbers.dtype.itemsize <= 2 or numbers.dtype == np.float32
        wide = np.float32 if exact else np.float64
        scale = np.array([self.scale[i] for i in bands])
        offset = np.array([self.offset[i] for i in bands], wide)
        # Each band stays one piece of memory, since views are cut band by band. A copy
        # that is changed in place is four times as fast as one product of two dtypes.
        planes = numbers.astype(wide)
        found = np.moveaxis(planes, 0, -1)
        # A division by 255 or 10000 is exact, the product with its inverse is not.
        inverse = np.round(1 / scale)
        with np.errstate(over="ignore", invalid="ignore"):
            if (scale == 1).all():
                pass
            elif (np.abs(inverse * scale - 1) <= 1e-9).all():
                planes /= inverse.astype(wide)[:, None, None]
            else:
                planes *= scale.astype(wide)[:, None, None]
            if offset.any():
                planes += offset[:, None, None]
            return found.astype(np.float32, copy=False)


def plan_values(
    dataset: rasterio.DatasetReader,
    plan: BandPlan,
    *,
    scale: float | Sequence[float] | None,
    offset: float | Sequence[float] | None,
    sensor: Sensor | None,
    where: str,
) -> Values:
    """Decide scale and offset of each band; UserError where they are not known."""
    from rasterio.enums import ColorInterp

    if ColorInterp.palette in (dataset.colorinterp[i - 1] for i in plan.indexes):
        raise UserError(
            f"{where}: its numbers are indices of a colour table; expand it first "
            "(gdal_translate -expand rgb)"
        )
    dtypes = [dataset.dtypes[i - 1] for i in plan.indexes]
    if any(dtype.startswith("complex") for dtype in dtypes):
        raise UserError(
            f"{where}: its numbers are {dtypes[0]}; expected real numbers: save the "
            "magnitude, or both parts as bands"
        )
    if offset is not None and scale is None:
        raise UserError(f"{where}: offset={offset} is given without scale=; give both")
    if scale is not None:
        count = len(dtypes)
        scales = _numbers(scale, count, "scale", where)
        offsets = _numbers(0 if offset is None else offset, count, "offset", where)
        if not all(scales):
            raise UserError(f"{where}: scale={scale}; expected numbers other than 0")
        return Values(scales, offsets, (_said(scales, offsets, "given"),))
    return _declared(dataset, plan, dtypes, sensor, where)


def _declared(
    dataset: rasterio.DatasetReader,
    plan: BandPlan,
    dtypes: Sequence[str],
    sensor: Sensor | None,
    where: str,
) -> Values:
    """Of the file, of the sensor, or of the dtype, band by band."""
    found = [
        _of_band(dataset, index, name, dtype, sensor, where)
        for index, name, dtype in zip(plan.indexes, plan.names, dtypes, strict=True)
    ]
    scales, offsets, sources = map(tuple, zip(*found, strict=True))
    notes = []
    for source in dict.fromkeys(filter(None, sources)):
        chosen = [i for i, other in enumerate(sources) if other == source]
        scale, offset = ([x[i] for i in chosen] for x in (scales, offsets))
        notes.append(_said(scale, offset, source))
    if sensor is not None and any(np.dtype(dtype).kind == "f" for dtype in dtypes):
        notes.append(
            f"floating-point numbers are taken as they are: the scale of {sensor.name} "
            "is for integers; give scale= if they are the same numbers"
        )
    return Values(scales, offsets, tuple(notes))


def _of_band(
    dataset: rasterio.DatasetReader,
    index: int,
    name: str,
    dtype: str,
    sensor: Sensor | None,
    where: str,
) -> tuple[float, float, str]:
    """Scale, offset, and who says so ("" where the dtype does)."""
    kind = np.dtype(dtype)
    in_file = (dataset.scales[index - 1], dataset.offsets[index - 1])
    # GDAL says 1 and 0 where a file says nothing.
    has_file = in_file != (1.0, 0.0)
    if has_file and not (in_file[0] and all(map(math.isfinite, in_file))):
        raise UserError(
            f"{where}: scale {in_file[0]} and offset {in_file[1]} in the file for band "
            f"{index}; give scale= and offset="
        )
    if sensor is not None and kind.kind != "f":
        place = sensor.bands.index(name)
        preset = (sensor.scale[place], sensor.offset[place])
        if dtype not in sensor.dtypes:
            raise UserError(
                f"{where}: its numbers are {dtype}, those of {sensor.name} are "
                f"{' or '.join(sensor.dtypes)}; leave sensor= out, or give scale="
            )
        if has_file and not np.allclose(in_file, preset, rtol=1e-5, atol=1e-12):
            raise UserError(
                f"{where}: scale {in_file[0]:g} and offset {in_file[1]:g} in the file, "
                f"{preset[0]:g} and {preset[1]:g} by {sensor.name}; give scale= and "
                "offset="
            )
        return (*preset, sensor.name)
    if has_file:
        return (*map(float, in_file), "the file")
    if kind.kind == "f":
        return 1.0, 0.0, ""
    bits = int(
        dataset.tags(index, ns="IMAGE_STRUCTURE").get("NBITS", 8 * kind.itemsize)
    )
    if kind.kind == "u" and bits < 8 * kind.itemsize and bits < 16:
        return 1 / (2**bits - 1), 0.0, f"NBITS={bits}"
    if kind == np.uint8:
        return 1 / 255, 0.0, ""
    raise UserError(
        f"{where}: its numbers are {dtype} without a scale; {_HELP}; "
        "scale=1 if they are the values"
    )


def _numbers(
    given: float | Sequence[float], count: int, what: str, where: str
) -> tuple[float, ...]:
    many = isinstance(given, (tuple, list, np.ndarray))
    try:
        numbers = [float(x) for x in given] if many else [float(given)] * count
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{where}: {what}={given!r}; expected a number, or one for each of {count} "
            "bands"
        )
    return tuple(numbers)


def _said(scales: Sequence[float], offsets: Sequence[float], source: str) -> str:
    different = len({*zip(scales, offsets, strict=True)}) > 1
    shown = f"{scales[0]:.6g} and {offsets[0]:.6g}"
    return f"scale and offset by {source}: {'of each band' if different else shown}"
