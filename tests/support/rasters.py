"""Rasters that tests write themselves, and the real ones beside the repository."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent.parent.parent.parent / "shared" / "data"
REASON = "rasterio is not installed (pip install 'xsmae[geo]')"


def unpack(name: str, folder: Path, only: str = "") -> Path:
    """The files of a zip in DATA whose names begin with `only`, below a folder."""
    with zipfile.ZipFile(DATA / name) as content:
        names = [n for n in content.namelist() if n.startswith(only)]
        content.extractall(folder, names)
    return folder


def north_up(x: float, y: float, dx: float, dy: float | None = None) -> tuple:
    """The six numbers of a geotransform whose first corner is (x, y)."""
    return dx, 0.0, float(x), 0.0, -(dx if dy is None else dy), float(y)


UTM = north_up(500_000, 5_000_000, 10)  # on the central meridian, 45 degrees north


def write(path: Path, data: np.ndarray, **options) -> Path:
    """A GeoTIFF of [bands, height, width], by default of 10 m in UTM zone 33.

    descriptions, mask [height, width], scales, offsets, colours: as rasterio sets them.
    internal: the mask's place. overviews: factors. tags: of the file. Other options are
    the driver's.
    """
    import rasterio
    from rasterio.enums import Resampling

    data = np.asarray(data)
    later = {
        key: options.pop(key)
        for key in ("descriptions", "scales", "offsets")
        if key in options
    }
    colours, mask = options.pop("colours", None), options.pop("mask", None)
    tags = options.pop("tags", None)
    internal, factors = options.pop("internal", True), options.pop("overviews", ())
    profile = {
        "driver": "GTiff",
        "count": data.shape[0],
        "height": data.shape[1],
        "width": data.shape[2],
        "dtype": data.dtype,
        "crs": "EPSG:32633",
        "transform": UTM,
        "photometric": "minisblack",
    } | options
    if profile["transform"] is not None:
        profile["transform"] = rasterio.Affine(*profile["transform"][:6])
    profile = {key: value for key, value in profile.items() if value is not None}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        with rasterio.open(path, "w", **profile) as raster:
            if tags:
                # Before the pixels: the directory then stays at the start of the file.
                raster.update_tags(**tags)
            raster.write(data)
            for key, value in later.items():
                setattr(raster, key, value)
            if colours is not None:
                raster.colorinterp = colours
            if mask is not None:
                raster.write_mask(mask)
        if factors:
            with rasterio.open(path, "r+") as raster:
                raster.build_overviews(factors, Resampling.average)
    return path


def land(height: int, width: int, bands: int = 3, dtype: str = "uint8") -> np.ndarray:
    """[bands, height, width], every pixel another number above 0 and below 251."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 7 + columns * 3 + band * 11 for band in range(bands)]
    return (np.stack(planes) % 250 + 1).astype(dtype)
