"""One raster: any file that GDAL opens, read window by window in known units.

    with xsmae.open_raster("scene.tif", sensor="sentinel2_l2a") as raster:
        values, valid = raster.read((0, 0, 512, 512), size=128)

At the opening, each by its own rules: `raster_bands` (bands, names, alpha),
`raster_values` (scale and offset), `raster_validity` (which pixels have a value) and
`raster_gsd` (metres per pixel). `Raster.notes` has what a user should know of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.data.gdal import Name
from xsmae.data.raster_bands import band_key, plan_bands
from xsmae.data.raster_gsd import find_gsd, given_gsd
from xsmae.data.raster_header import Overviews, check_header, find_overviews
from xsmae.data.raster_kept import Kept, kept_window, windows_here
from xsmae.data.raster_pixels import (
    EXACT,
    Datasets,
    Region,
    check_window,
    put_together,
    some_blocks,
    valid_pieces,
    value_pieces,
)
from xsmae.data.raster_resample import Resampled, weights
from xsmae.data.raster_validity import Validity, plan_validity
from xsmae.data.raster_values import Values, plan_values
from xsmae.data.sensors import Sensor, find_sensor
from xsmae.errors import BadImageError, UserError, printable

if TYPE_CHECKING:
    import affine
    from jaxtyping import Bool, Float

# Pixels of an overview for a pixel that is read, so that the last average is ours.
_MARGIN = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Raster:
    """An opened raster; `open_raster` makes it. A context that closes it at its end.

    bands: names, in order. dtype: of the stored numbers. crs: as text, None if there is
    none. transform: of pixels (x, y) to the CRS. shape: height, width. gsd: metres per
    pixel along y and x, at the centre; None where it is not known. block_shape: height,
    width of what GDAL decodes at a time. nodata, scale, offset: one for each band;
    value = number * scale + offset.

    It can be pickled, and used after a fork and by several threads: each process opens
    its own datasets when it reads.
    """

    path: str
    bands: tuple[str, ...]
    dtype: str
    crs: str | None
    transform: affine.Affine
    shape: tuple[int, int]
    gsd: tuple[float, float] | None
    block_shape: tuple[int, int]
    sensor: Sensor | None
    overviews: Overviews
    indexes: tuple[int, ...]
    values: Values
    validity: Validity
    stamp: tuple[int, int] | None
    files: tuple[str, ...]
    _notes: tuple[str, ...]

    @property
    def scale(self) -> tuple[float, ...]:
        """Of each band."""
        return self.values.scale

    @property
    def offset(self) -> tuple[float, ...]:
        """Of each band."""
        return self.values.offset

    @property
    def nodata(self) -> tuple[float | None, ...]:
        """Of each band; None where no number stands for no value."""
        return self.validity.nodata

    def notes(self) -> list[str]:
        """What was decided that a user should know, a line each."""
        return list(self._notes)

    def known_gsd(self) -> tuple[float, float]:
        """Metres per pixel along y and x; UserError where it is not known."""
        if self.gsd is None:
            raise UserError(
                f"{printable(self.path)}: its GSD is not known (no CRS or geotransform "
                "says it); give gsd= in metres per pixel"
            )
        return self.gsd

    @gdal.retried
    def read(
        self,
        window: tuple[float, float, float, float],
        size: int | tuple[int, int] | None = None,
        bands: Sequence[str] | None = None,
        *,
        group: Sequence[Region] = (),
    ) -> tuple[
        Float[np.ndarray, "height width bands"], Bool[np.ndarray, "height width"]
    ]:
        """The values of a window, and which of its pixels are valid.

        window: top, left, height, width in pixels; fractions if there is a `size`. What
        lies outside the raster is not valid. size: the height and width of the result;
        None: the window's. bands: names, in that order; None: all. group: windows of
        whole pixels, this one among them, that are wanted soon: they are read together
        and kept for a while (`raster_kept`), which changes no value.

        A smaller size is the average of the valid pixels, from an overview that is fine
        enough if there is one; a larger one is interpolated linearly. A pixel of the
        result is valid where at least half of its area is. Values are float32, 0 where
        they are not valid. Raises BadImageError where pixels cannot be read.
        """
        chosen = self._places(bands)
        top, left, height, width = check_window(
            window, size, self.shape, printable(self.path)
        )
        rows, columns = (size, size) if isinstance(size, int) else size or (0, 0)
        level = kept = None
        if size is not None:
            level = self.overviews.level(min(height / rows, width / columns) / _MARGIN)
        if group and level is None and bands is None:
            place = (Name(self.path, None, self.stamp), (top, left, height, width))
            kept = kept_window(*place, group, self.indexes, self.validity)
        if size is None:
            region = (int(top), int(left), int(height), int(width))
            with self._borrowed(None, kept) as datasets:
                pieces = self._pieces(datasets, region, chosen)
                return put_together(pieces, region, len(chosen))
        with self._borrowed(level, kept) as datasets:
            dataset = datasets.read
            down = dataset.height / self.shape[0]
            across = dataset.width / self.shape[1]
            by_row, first = weights(top * down, (top + height) * down, rows)
            by_column, start = weights(left * across, (left + width) * across, columns)
            result = Resampled(by_row, by_column, len(chosen))
            region = (first, start, by_row.shape[1], by_column.shape[1])
            for above, values, valid in self._pieces(datasets, region, chosen):
                result.add(above - first, values, valid)
        return result.result()

    def valid_fraction(self) -> float:
        """The part of the pixels that is valid, in all bands, 0 to 1.

        Exact up to 2^24 pixels. Above, it is that of the finest overview of at most so
        many pixels; without one, of so many pixels in blocks, always the same ones.
        """
        if self.validity.always:
            return 1.0
        pixels = math.prod(self.shape)
        level = None
        if pixels > EXACT:
            level = self.overviews.small_enough(math.sqrt(pixels / EXACT))
        with self._borrowed(level) as datasets:
            dataset = datasets.read
            regions = [(0, 0, *dataset.shape)]
            if math.prod(dataset.shape) > EXACT:
                regions = some_blocks(dataset, self.indexes[0])
            valid = [
                (piece.sum(), piece.size)
                for region in regions
                for _, piece in self._valid(datasets, region)
            ]
        good, total = np.sum(valid, axis=0)
        return float(good / total)

    def valid_cells(
        self, rows: Sequence[int], columns: Sequence[int]
    ) -> Float[np.ndarray, "down across"]:
        """The valid part of each cell between edges, of overviews if they are fine.

        rows, columns: edges in pixels, ascending. A cell that cannot be read is NaN.
        """
        shape = (len(rows) - 1, len(columns) - 1)
        if self.validity.always:
            return np.ones(shape)
        side = min(np.diff(rows).min(), np.diff(columns).min())
        # 16 x 16 pixels of an overview for the smallest cell.
        level = self.overviews.level(side / 16, values=False)
        found = np.full(shape, np.nan)
        for i in range(shape[0]):
            between = rows[i : i + 2]
            try:
                found[i] = self._cells_between(level, between, columns)
            except BadImageError:
                for j in range(shape[1]):
                    with contextlib.suppress(BadImageError):
                        edges = columns[j : j + 2]
                        found[i, j] = self._cells_between(level, between, edges)[0]
        return found

    def _cells_between(
        self, level: int | None, rows: Sequence[int], columns: Sequence[int]
    ) -> np.ndarray:
        with self._borrowed(level) as datasets:
            dataset = datasets.read
            down = np.array(rows) * dataset.height / self.shape[0]
            across = np.array(columns) * dataset.width / self.shape[1]
            down, across = (np.round(x).astype(int) for x in (down, across))
            region = (down[0], across[0], down[1] - down[0], across[-1] - across[0])
            sums = np.zeros(len(columns) - 1)
            for _, valid in self._valid(datasets, tuple(map(int, region))):
                sums += np.add.reduceat(valid.sum(axis=0), across[:-1] - across[0])
        return sums / (np.diff(across) * (down[1] - down[0]))

    def close(self) -> None:
        """Close its files in this process; a later reading opens them again."""
        gdal.close(self.path)
        windows_here().forget(self.path)

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        height, width = self.shape
        return f"Raster({height} x {width}, {self.dtype}, {','.join(self.bands)})"

    @contextlib.contextmanager
    def _borrowed(
        self, level: int | None, kept: Kept | None = None
    ) -> Iterator[Datasets]:
        if kept is not None:
            yield Datasets(kept, None)
            return
        with contextlib.ExitStack() as stack:
            names = [Name(self.path, level, self.stamp)]
            if level is not None and self.validity.masks:
                names.append(Name(self.path, None, self.stamp))
            found = [stack.enter_context(gdal.borrowed(name)) for name in names]
            yield Datasets(found[0], found[1] if len(found) > 1 else None)

    def _places(self, bands: Sequence[str] | None) -> list[int]:
        if bands is None:
            return list(range(len(self.bands)))
        own = {band_key(name): i for i, name in enumerate(self.bands)}
        unknown = [name for name in bands if band_key(name) not in own]
        if unknown or not len(bands) or isinstance(bands, str):
            raise UserError(
                f"{printable(self.path)}: bands={bands!r}; expected some of "
                f"{', '.join(self.bands)}"
            )
        return [own[band_key(name)] for name in bands]

    def _pieces(
        self, datasets: Datasets, region: Region, chosen: list[int]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return value_pieces(
            datasets, region, self.indexes, chosen, self.values, self.validity
        )

    def _valid(
        self, datasets: Datasets, region: Region
    ) -> Iterator[tuple[int, np.ndarray]]:
        return valid_pieces(datasets, region, self.indexes, self.validity)


def open_raster(
    path: str | os.PathLike,
    bands: Sequence[str] | None = None,
    scale: float | Sequence[float] | None = None,
    offset: float | Sequence[float] | None = None,
    gsd: float | tuple[float, float] | None = None,
    nodata_rule: str = "all",
    *,
    sensor: str | None = None,
) -> Raster:
    """Open a raster of any format that GDAL reads; nothing is decoded but a sample of
    a band that is called alpha.

    Args:
      path: a file, a URL, or a name of GDAL's (/vsicurl/..., NETCDF:file.nc:name).
      bands: names that the raster has, or its sensor's, to choose bands; or one name
        for each band.
      scale, offset: numbers, or one for each band; value = number * scale + offset.
      gsd: metres per pixel, or (y, x); None: from the CRS.
      nodata_rule: a pixel has no value where "all" of its bands are nodata, or "any".
      sensor: a preset of `sensors.SENSORS`: names, scale, offset and nodata.

    Raises:
      UserError: what a user can mend: no such file, no rasterio, no scale, bad options.
      BadImageError: the raster cannot be used: not a raster, damaged, a bad mask.
    """
    preset = find_sensor(sensor)
    name = gdal.dataset_name(path)
    where = printable(name)
    if gdal.is_file(name) and not os.path.exists(name):
        raise UserError(f"{where} does not exist; expected a raster")
    given = given_gsd(gsd, where)
    stamp = gdal.stamp_of(name)
    with gdal.borrowed(Name(name, None, stamp)) as dataset:
        check_header(dataset, where)
        plan = plan_bands(dataset, given=bands, sensor=preset, where=where)
        options = {"sensor": preset, "where": where}
        values = plan_values(dataset, plan, scale=scale, offset=offset, **options)
        validity = plan_validity(dataset, plan, rule=nodata_rule, **options)
        overviews = find_overviews(dataset)
        crs = dataset.crs.to_string() if dataset.crs else None
        ground = find_gsd(
            dataset.transform,
            crs,
            dataset.shape,
            given=given,
            has_points=bool(dataset.gcps[0]),
        )
        dtypes = {dataset.dtypes[i - 1] for i in plan.indexes}
        return Raster(
            path=name,
            bands=plan.names,
            dtype=str(np.result_type(*dtypes)),
            crs=crs,
            transform=dataset.transform,
            shape=dataset.shape,
            gsd=ground.gsd,
            block_shape=tuple(dataset.block_shapes[plan.indexes[0] - 1]),
            sensor=preset,
            overviews=overviews,
            indexes=plan.indexes,
            values=values,
            validity=validity,
            stamp=stamp,
            files=tuple(dataset.files),
            _notes=(
                *plan.notes, *values.notes, *validity.notes, *ground.notes,
                *overviews.notes,
            ),
        )  # fmt: skip
