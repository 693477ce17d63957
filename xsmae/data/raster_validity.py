"""Which pixels of a raster have a value.

A pixel is valid if everything that the raster says about it agrees:

- its numbers are not the nodata value: in at least one band (rule "all": invalid where
  ALL bands are nodata, as GDAL has it), or in every band (rule "any": invalid where ANY
  band is), of the bands that are read and have a nodata value;
- the mask is not 0: internal, beside the file (.msk), or of a band;
- alpha is at least half of its greatest value;
- its values are finite in every band that is read, whatever the nodata value is.

GDAL lets a mask win over the nodata value; here both count.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.gdal import Name, is_file, open_dataset, reason
from xsmae.data.raster_bands import BandPlan
from xsmae.data.sensors import Sensor
from xsmae.errors import BadImageError, UserError, printable

if TYPE_CHECKING:
    import rasterio

RULES = ("all", "any")


@dataclasses.dataclass(frozen=True)
class Validity:
    """What says whether a pixel is valid.

    nodata: of each band that is read; None: no number of it. masks: GDAL's indexes of
    the bands whose masks count; shared: they all have one. alpha: GDAL's index.
    floats: there are numbers that can be not finite.
    """

    rule: str
    nodata: tuple[float | None, ...]
    masks: tuple[int, ...]
    shared: bool
    alpha: int | None
    floats: bool
    notes: tuple[str, ...]

    @property
    def always(self) -> bool:
        """True if every pixel is valid, whatever its numbers."""
        return not (self.by_number or self.masks or self.alpha)

    @property
    def by_number(self) -> bool:
        """True if the numbers of the bands say anything."""
        return self.floats or any(x is not None for x in self.nodata)

    def of(
        self,
        dataset: rasterio.DatasetReader,
        window: rasterio.windows.Window,
        numbers: np.ndarray | None,
        bands: Sequence[int],
        whole: rasterio.DatasetReader | None = None,
    ) -> np.ndarray:
        """bool [h, w] of a window.

        numbers: [bands, h, w] as they are stored; None unless `by_number`. bands: their
        places among those that are read. whole: the raster that `dataset` is an
        overview of. Its masks are read, since an overview that has none says that every
        pixel is valid.
        """
        shape = int(window.height), int(window.width)
        valid = np.ones(shape, bool)
        if numbers is not None:
            valid &= self._has_values(numbers, bands)
        place = window
        if whole is not None:
            place = _enlarged(
                window, whole.height / dataset.height, whole.width / dataset.width
            )
        for index in self.masks[:1] if self.shared else self._of(bands):
            masks = (whole or dataset).read_masks(index, window=place, out_shape=shape)
            valid &= masks > 0
        if self.alpha is not None:
            alpha = dataset.read(self.alpha, window=window)
            greatest = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
            valid &= alpha >= greatest / 2
        return valid

    def _of(self, bands: Sequence[int]) -> list[int]:
        return [self.masks[i] for i in bands] if self.masks else []

    def _has_values(self, numbers: np.ndarray, bands: Sequence[int]) -> np.ndarray:
        valid = np.ones(numbers.shape[1:], bool)
        missing = [
            band == numbers.dtype.type(self.nodata[i])
            for band, i in zip(numbers, bands, strict=True)
            if self.nodata[i] is not None
        ]
        if missing:
            among = np.all if self.rule == "all" else np.any
            valid &= ~among(missing, axis=0)
        if numbers.dtype.kind == "f":
            valid &= np.isfinite(numbers).all(axis=0)
        return valid


def _enlarged(
    window: rasterio.windows.Window, down: float, across: float
) -> rasterio.windows.Window:
    from rasterio.windows import Window

    return Window(
        window.col_off * across,
        window.row_off * down,
        window.width * across,
        window.height * down,
    )


def plan_validity(
    dataset: rasterio.DatasetReader,
    plan: BandPlan,
    *,
    rule: str,
    sensor: Sensor | None,
    where: str,
) -> Validity:
    """Decide what says whether a pixel is valid.

    Raises BadImageError for a mask that cannot be read or has another size.
    """
    from rasterio.enums import MaskFlags

    if rule not in RULES:
        raise UserError(f"nodata_rule={rule!r}; expected one of {', '.join(RULES)}")
    _check_mask_file(dataset, where)
    nodata, notes = _nodata_of(dataset, plan, sensor)
    flags = [{*dataset.mask_flag_enums[i - 1]} for i in plan.indexes]
    # Of alpha GDAL says the same as of a mask; whether it is one is decided elsewhere.
    # A band with a mask of its own has no flag at all.
    shared = [MaskFlags.per_dataset in f and MaskFlags.alpha not in f for f in flags]
    own = [not f for f in flags]
    masks = plan.indexes if any(shared) or any(own) else ()
    if masks:
        kind = "a mask" if all(shared) else "masks of its bands"
        files = [os.path.basename(f) for f in dataset.files if f.endswith(".msk")]
        beside = f" ({printable(files[0])})" if files else ""
        notes.append(f"validity by {kind}{beside}")
        if any(x is not None for x in nodata):
            notes.append("validity by the nodata value as well as by the mask")
    dtypes = [np.dtype(dataset.dtypes[i - 1]) for i in plan.indexes]
    return Validity(
        rule=rule,
        nodata=nodata,
        masks=masks,
        shared=all(shared),
        alpha=plan.alpha,
        floats=any(dtype.kind == "f" for dtype in dtypes),
        notes=tuple(notes),
    )


def _nodata_of(
    dataset: rasterio.DatasetReader, plan: BandPlan, sensor: Sensor | None
) -> tuple[tuple[float | None, ...], list[str]]:
    """Of each band, None where no number can be it."""
    found, notes = [], []
    declared = [dataset.nodatavals[i - 1] for i in plan.indexes]
    if sensor is not None and sensor.nodata is not None:
        integer = all(
            np.dtype(dataset.dtypes[i - 1]).kind in "iu" for i in plan.indexes
        )
        if integer and all(value is None for value in declared):
            declared = [sensor.nodata] * len(declared)
            notes.append(f"nodata {sensor.nodata:g}, as {sensor.name} has it")
    for index, value in zip(plan.indexes, declared, strict=True):
        dtype = np.dtype(dataset.dtypes[index - 1])
        if value is None or np.isnan(value):
            found.append(None)  # what is not finite is never valid
        elif dtype.kind in "iu" and not (
            float(value).is_integer()
            and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
        ):
            notes.append(f"the nodata value {value:g} cannot occur in {dtype}")
            found.append(None)
        else:
            found.append(value)
    return tuple(found), list(dict.fromkeys(notes))


def _check_mask_file(dataset: rasterio.DatasetReader, where: str) -> None:
    """GDAL passes over a mask that it cannot use, and every pixel would be valid."""
    from rasterio.enums import MaskFlags

    path = f"{dataset.name}.msk"
    if not (is_file(dataset.name) and os.path.exists(path)):
        return
    shown = printable(os.path.basename(path))
    try:
        with open_dataset(Name(path)) as mask:
            shape = mask.shape
    except Exception as error:
        raise BadImageError(
            f"{where}: its mask {shown} cannot be read: {reason(error)}"
        ) from error
    if shape != dataset.shape:
        raise BadImageError(
            f"{where}: its mask {shown} has {shape[0]} x {shape[1]} pixels, the raster "
            f"{dataset.shape[0]} x {dataset.shape[1]}; make the mask anew or remove it"
        )
    others = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    if others & {*dataset.mask_flag_enums[0]}:
        raise BadImageError(
            f"{where}: its mask {shown} does not say that it is one "
            "(INTERNAL_MASK_FLAGS); make the mask anew or remove it"
        )
