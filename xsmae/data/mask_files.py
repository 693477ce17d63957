"""One mask: the numbers of a PNG or a GeoTIFF, and whether it lies on its image."""

from __future__ import annotations

import math
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.data.images import read_numbers
from xsmae.data.mask_classes import MaskClasses
from xsmae.data.raster_header import check_header
from xsmae.errors import BadImageError, UserError, printable

if TYPE_CHECKING:
    import affine
    import rasterio
    from jaxtyping import UInt8

    from xsmae.data.raster import Raster

SHIFT = 0.01  # pixels that the corners of a mask and its image may be apart


def read_mask(
    path: pathlib.Path,
    classes: MaskClasses,
    shape: tuple[int, int],
    *,
    max_pixels: int,
    raster: Raster | None = None,
) -> UInt8[np.ndarray, "height width"]:
    """The class of each pixel, `mask_classes.IGNORE` where it does not count.

    shape: of the image. raster: the image, if it is one; the mask must then have its
    CRS and transform, unless it has neither. UserError for a mask that cannot be used.
    """
    where = printable(str(path))
    if path.suffix.lower() != ".png":
        return _read_raster(path, classes, shape, raster)
    try:
        numbers = read_numbers(path, max_pixels=max_pixels, shape=shape)
    except BadImageError as error:
        raise UserError(f"{where}: {error}") from None
    return classes.of(numbers, where)


def _read_raster(
    path: pathlib.Path,
    classes: MaskClasses,
    shape: tuple[int, int],
    raster: Raster | None,
) -> np.ndarray:
    where, name = printable(str(path)), gdal.dataset_name(path)
    try:
        with gdal.borrowed(gdal.Name(name, None, gdal.stamp_of(name))) as dataset:
            check_header(dataset, where)
            if dataset.shape != tuple(shape):
                raise UserError(
                    f"{where}: {dataset.height} x {dataset.width} pixels (height x "
                    f"width), its image has {shape[0]} x {shape[1]}; expected the same "
                    "size"
                )
            _check_bands(dataset, classes, where)
            if raster is not None:
                _check_place(dataset, raster, where)
            numbers = dataset.read()
            valid = dataset.dataset_mask() > 0
    except BadImageError as error:
        raise UserError(str(error)) from None
    stored = numbers[0] if len(numbers) == 1 else np.moveaxis(numbers, 0, -1)
    return classes.of(stored, where, valid=valid)


def _check_bands(
    dataset: rasterio.DatasetReader, classes: MaskClasses, where: str
) -> None:
    """UserError unless the bands can be numbers or colours, and nodata is no class."""
    kinds = set(dataset.dtypes)
    numbers = dataset.count == 1 and np.dtype(dataset.dtypes[0]).kind in "iuf"
    if not numbers and not (dataset.count == 3 and kinds == {"uint8"}):
        raise UserError(
            f"{where}: {dataset.count} bands of {', '.join(sorted(kinds))}; expected "
            "one band of numbers, or red, green and blue in uint8"
        )
    nodata = dataset.nodata
    known = classes.numbers if numbers else classes.colours
    if nodata is not None and (nodata if numbers else (nodata,) * 3) in known:
        name = classes.names[known.index(nodata if numbers else (nodata,) * 3)]
        raise UserError(
            f"{where}: its nodata is {nodata:g}, which is the class {name!r} in "
            f"{classes.where}; remove one (gdal_edit.py -unsetnodata)"
        )


def _check_place(dataset: rasterio.DatasetReader, raster: Raster, where: str) -> None:
    """UserError unless the mask has the CRS and the transform of the image."""
    if dataset.crs is None and dataset.transform.is_identity:
        return
    image = printable(raster.path)
    if dataset.crs is not None and not same_crs(dataset.crs.to_string(), raster.crs):
        raise UserError(
            f"{where}: its CRS is {dataset.crs.to_string()}, that of {image} is "
            f"{raster.crs}; expected the same"
        )
    shift = _shift(dataset.transform, raster.transform, raster.shape)
    if shift > SHIFT:
        raise UserError(
            f"{where}: its transform is {_shown(dataset.transform)}, that of {image} "
            f"is {_shown(raster.transform)}, up to {shift:.4g} pixels apart; expected "
            "the same"
        )


def same_crs(one: str | None, other: str | None) -> bool:
    """True for two texts of one CRS."""
    if one is None or other is None or one == other:
        return one == other
    crs = gdal.import_rasterio().crs.CRS
    return crs.from_user_input(one) == crs.from_user_input(other)


def _shift(one: affine.Affine, other: affine.Affine, shape: tuple[int, int]) -> float:
    """The largest distance of two corners, in pixels of the second."""
    height, width = shape
    corners = [(0, 0), (width, 0), (0, height), (width, height)]
    apart = [np.subtract(one @ c, other @ c) for c in corners]
    side = min(math.hypot(other.a, other.d), math.hypot(other.b, other.e))
    return max(math.hypot(*d) for d in apart) / max(side, 1e-300)


def _shown(transform: affine.Affine) -> str:
    return f"({', '.join(f'{x:.10g}' for x in tuple(transform)[:6])})"
