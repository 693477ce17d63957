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
    import affine
    from jaxtyping import Shaped

SIDE = 512  # pixels, of the blocks
NODATA = 255


@dataclasses.dataclass(frozen=True)
class Layers:
    """Bands to be written, by default 8-bit ones of the size of a raster.

    rows: [height, bands, width], in memory or mapped from a file. names: of the bands.
    resampling: of overviews. colours: of the numbers of the only band, or (). tags:
    text for the file's metadata. scale: value = number * scale, of all bands or of
    each. nodata: of pixels without a value. transform: None: that of the raster. crs:
    as text, where there is no raster. side: pixels of a block.
    """

    rows: Shaped[np.ndarray, "height bands width"]
    names: Sequence[str]
    resampling: str
    colours: Sequence[tuple[int, int, int]] = ()
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: float | Sequence[float] = 1.0
    nodata: float = NODATA
    transform: affine.Affine | None = None
    crs: str | None = None
    side: int = SIDE


def write_cog(
    path: Path, layers: Layers, *, like: Raster | None = None, scratch: Path
) -> None:
    """Write `layers` with the CRS and transform of `like`, and read them back.

    like: None: the layers have a CRS and a transform of their own. scratch: a file that
    is written before, not compressed. Raises UserError if one cannot be written.
    """
    height, count, width = layers.rows.shape
    place = _place(layers, like)
    side, dtype = layers.side, layers.rows.dtype
    profile = {
        "driver": "GTiff", "dtype": dtype, "count": count, "height": height,
        "width": width, "nodata": layers.nodata, "tiled": True, "blockxsize": side,
        "blockysize": side, "BIGTIFF": "IF_SAFER", "interleave": "band", **place,
    }  # fmt: skip
    _write_plain(scratch, layers, profile)
    with gdal.writing(path) as rasterio:
        from rasterio import shutil

        options = {"COMPRESS": "DEFLATE", "BLOCKSIZE": side, "BIGTIFF": "IF_SAFER"}
        shutil.copy(
            scratch, path, driver="COG", OVERVIEW_RESAMPLING=layers.resampling,
            **options,
        )  # fmt: skip
        with rasterio.open(path) as written:
            for window, rows in _pieces(layers):
                found = written.read(window=window)
                if not np.array_equal(found, rows, equal_nan=dtype.kind == "f"):
                    raise UserError(
                        f"{printable(str(path))} was not written as it should be: is "
                        "the disk full or damaged?"
                    )


def _place(layers: Layers, like: Raster | None) -> dict[str, Any]:
    if like is None:
        return {"crs": layers.crs, "transform": layers.transform}
    with gdal.borrowed(Name(like.path, None, like.stamp)) as dataset:
        points, crs_of_points = dataset.gcps
        place = {"crs": dataset.crs, "transform": dataset.transform}
        if layers.transform is not None:
            place["transform"] = layers.transform
        elif points and dataset.crs is None:
            place = {"crs": crs_of_points, "gcps": points}
    return place


def read_tags(path: Path) -> dict[str, str]:
    """The text in the metadata of a raster that may be replaced soon."""
    name = str(path.absolute())
    with gdal.borrowed(Name(name)) as dataset:
        found = dataset.tags()
    gdal.close(name)
    return found


def _write_plain(path: Path, layers: Layers, profile: dict[str, Any]) -> None:
    with gdal.writing(path) as rasterio, rasterio.open(path, "w", **profile) as target:
        for window, rows in _pieces(layers):
            target.write(rows, window=window)
        target.descriptions = tuple(layers.names)
        target.update_tags(**layers.tags)
        scales = np.broadcast_to(layers.scale, target.count)
        if (scales != 1).any():
            target.scales = tuple(map(float, scales))
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


def _pieces(layers: Layers) -> Iterator[tuple[tuple, np.ndarray]]:
    """Windows of whole rows of blocks, and their numbers [bands, rows, width]."""
    height, _, width = layers.rows.shape
    for top in range(0, height, layers.side):
        stop = min(top + layers.side, height)
        part = np.ascontiguousarray(layers.rows[top:stop].transpose(1, 0, 2))
        yield ((top, stop), (0, width)), part
