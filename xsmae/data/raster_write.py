"""Writes a map beside a raster's own pixels: a Cloud-Optimized GeoTIFF, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from xsmae.data import gdal
from xsmae.data.gdal import Name
from xsmae.data.raster import Raster
from xsmae.errors import UserError, printable

if TYPE_CHECKING:
    from jaxtyping import UInt8

SIDE = 512  # pixels, of the blocks
NODATA = 255


@dataclasses.dataclass(frozen=True)
class Layers:
    """8-bit bands of the size of a raster, to be written.

    rows: [height, bands, width], in memory or mapped from a file. names: of the bands.
    resampling: of overviews. colours: of the numbers of the only band, or (). tags:
    text for the file's metadata. scale: value = number * scale.
    """

    rows: UInt8[np.ndarray, "height bands width"]
    names: Sequence[str]
    resampling: str
    colours: Sequence[tuple[int, int, int]] = ()
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: float = 1.0


def write_cog(path: Path, layers: Layers, *, like: Raster, scratch: Path) -> None:
    """Write `layers` with the CRS and transform of `like`, and read them back.

    scratch: a file that is written before, not compressed. Raises UserError if one
    cannot be written.
    """
    height, count, width = layers.rows.shape
    with gdal.borrowed(Name(like.path, None, like.stamp)) as dataset:
        points, crs_of_points = dataset.gcps
        place = {"crs": dataset.crs, "transform": dataset.transform}
        if points and dataset.crs is None:
            place = {"crs": crs_of_points, "gcps": points}
    profile = {
        "driver": "GTiff", "dtype": "uint8", "count": count, "height": height,
        "width": width, "nodata": NODATA, "tiled": True, "blockxsize": SIDE,
        "blockysize": SIDE, "BIGTIFF": "IF_SAFER", "interleave": "band", **place,
    }  # fmt: skip
    _write_plain(scratch, layers, profile)
    with gdal.writing(path) as rasterio:
        from rasterio import shutil

        options = {"COMPRESS": "DEFLATE", "BLOCKSIZE": SIDE, "BIGTIFF": "IF_SAFER"}
        shutil.copy(
            scratch, path, driver="COG", OVERVIEW_RESAMPLING=layers.resampling,
            **options,
        )  # fmt: skip
        with rasterio.open(path) as written:
            for window, rows in _pieces(layers.rows):
                if not np.array_equal(written.read(window=window), rows):
                    raise UserError(
                        f"{printable(str(path))} was not written as it should be: is "
                        "the disk full or damaged?"
                    )


def _write_plain(path: Path, layers: Layers, profile: dict[str, Any]) -> None:
    with gdal.writing(path) as rasterio, rasterio.open(path, "w", **profile) as target:
        for window, rows in _pieces(layers.rows):
            target.write(rows, window=window)
        target.descriptions = tuple(layers.names)
        target.update_tags(**layers.tags)
        if layers.scale != 1:
            target.scales = (layers.scale,) * target.count
        if layers.colours:
            table = {i: (*map(int, c), 255) for i, c in enumerate(layers.colours)}
            target.write_colormap(1, {**table, NODATA: (0, 0, 0, 0)})


def write_categories(path: Path, names: Sequence[str]) -> None:
    """Write the names of a band's numbers, which GDAL keeps beside a GeoTIFF.

    path: `MAP.tif.aux.xml`.
    """
    entries = "".join(f"      <Category>{escape(name)}</Category>\n" for name in names)
    path.write_text(
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{entries}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )


def _pieces(rows: np.ndarray) -> Iterator[tuple[tuple, np.ndarray]]:
    """Windows of whole rows of blocks, and their numbers [bands, rows, width]."""
    height, _, width = rows.shape
    for top in range(0, height, SIDE):
        stop = min(top + SIDE, height)
        part = np.ascontiguousarray(rows[top:stop].transpose(1, 0, 2))
        yield ((top, stop), (0, width)), part
