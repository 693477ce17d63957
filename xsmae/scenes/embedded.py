"""Embedded scenes as grids: a cell for each chip or patch, and its vector."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xsmae.data import gdal
from xsmae.data.raster_gsd import ground_size
from xsmae.errors import BadImageError, UserError, printable
from xsmae.evaluation.segmentation.windows import window_starts
from xsmae.scenes.finish import EMB
from xsmae.scenes.stored import Stored, check_same, unit, vectors_of

if TYPE_CHECKING:
    import affine
    from jaxtyping import Float, Int

CHIP, TOKEN = "chip", "token"
WORDS = {CHIP: "chips", TOKEN: "patches"}
UNITS = {".parquet": CHIP, ".tif": TOKEN}
SHOWN = 5  # names in a message


class Block(NamedTuple):
    """Vectors of unit length and their cells; vectors of zeros stay zeros."""

    rows: Int[np.ndarray, " n"]
    columns: Int[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n width"]


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedGrid:
    """A scene that `xsmae embed` wrote, with a cell for each chip or patch.

    emb: the content of the key `emb`. down, across: the centres of the chips along y
    and x, in pixels of the scene. stride: of cells, along y and x. pixels: height and
    width of the scene. transform: of its pixels to its CRS. crs: as text; None where
    there is no place on Earth. gsd: metres per pixel of the scene along y and x. date:
    "" if it is not known. source: what the scene was read from.
    """

    path: Path
    unit: str
    emb: dict[str, Any]
    down: Float[np.ndarray, " rows"]
    across: Float[np.ndarray, " columns"]
    stride: tuple[int, int]
    pixels: tuple[int, int]
    transform: affine.Affine
    crs: str | None
    gsd: tuple[float, float]
    date: str
    source: str

    @property
    def name(self) -> str:
        """Of the scene's files."""
        return self.path.stem

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return len(self.down), len(self.across)

    @property
    def cell(self) -> tuple[float, float]:
        """Metres of a cell along y and x."""
        return self.gsd[0] * self.stride[0], self.gsd[1] * self.stride[1]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, top and bottom of all cells, in pixels of the scene."""
        (high, wide), (rows, columns) = self.stride, self.shape
        top, left = self.down[0] - high / 2, self.across[0] - wide / 2
        return left, left + columns * wide, top, top + rows * high

    @property
    def cell_transform(self) -> affine.Affine:
        """Of cells to the CRS.

        The centre of a cell is that of its chip. A last chip that was moved back is in
        the next cell, whose centre is less than a stride from its own.
        """
        left, _, top, _ = self.extent
        high, wide = self.stride
        a, b, _, d, e, _ = self.transform[:6]
        x, y = apply(self.transform, left, top)
        return type(self.transform)(a * wide, b * high, x, d * wide, e * high, y)

    def blocks(self) -> Iterator[Block]:
        """All vectors, some at a time, in the order of the file.

        Raises UserError if the file cannot be read, or has other cells or numbers.
        """
        read = self._of_table if self.unit == CHIP else self._of_raster
        for rows, columns, vectors in read():
            if not np.isfinite(vectors).all():
                raise UserError(
                    f"{printable(str(self.path))} has vectors that are not finite: "
                    "embed its scene again"
                )
            if len(rows):
                yield Block(rows, columns, unit(vectors))

    def _of_table(self):
        stored = Stored.open(self.path.parent, [self.path])
        starts = [
            np.rint(centres - size / 2).astype(int)
            for centres, size in zip(
                (self.down, self.across),
                self.emb["emb:chip_layout"]["chip_size"],
                strict=True,
            )
        ]
        for _, batch in stored.batches(["row", "col", "embedding"]):
            places = []
            for name, known in zip(("row", "col"), starts, strict=True):
                pixels = batch.column(name).to_numpy()
                found = np.searchsorted(known, pixels).clip(max=len(known) - 1)
                if (known[found] != pixels).any():
                    raise UserError(
                        f"{printable(str(self.path))} has chips that are not in its "
                        "grid: embed its scene again"
                    )
                places.append(found)
            # The scale of a row of int8 has no effect on its direction.
            yield *places, vectors_of(batch, stored.width).astype(np.float32)

    def _of_raster(self):
        name = str(self.path.absolute())
        with _readable(self.path), gdal.borrowed(gdal.Name(name)) as dataset:
            scales = np.array(dataset.scales, np.float32)
            for _, window in dataset.block_windows(1):
                numbers = dataset.read(window=window)
                if dataset.dtypes[0] == "float32":
                    known = np.isfinite(numbers[0])
                else:
                    known = numbers[0] != dataset.nodata
                rows, columns = np.nonzero(known)
                vectors = numbers[:, rows, columns].T * scales
                yield rows + window.row_off, columns + window.col_off, vectors


def apply(
    transform: affine.Affine, x: float | np.ndarray, y: float | np.ndarray
) -> tuple[float | np.ndarray, float | np.ndarray]:
    """Places (x, y) after a transform."""
    a, b, c, d, e, f = transform[:6]  # affine 3.1 has another operator than 3.0
    return a * x + b * y + c, d * x + e * y + f


def open_grids(folder: str | Path, names: Sequence[str] = ()) -> list[EmbeddedGrid]:
    """The scenes of a folder, all or those of `names`, in that order.

    Raises UserError if a scene is not there, a file is damaged, or the vectors of two
    scenes cannot be compared.
    """
    folder = Path(folder)
    paths = [p for end in UNITS for p in sorted(folder.glob(f"[!.]*{end}"))]
    found = {path.stem: path for path in paths}
    if not found:
        why = "has no embeddings" if folder.is_dir() else "is no folder"
        raise UserError(
            f"{printable(str(folder))} {why}, expected the folder that xsmae embed "
            "SCENES --out=FOLDER wrote"
        )
    for name in names:
        if name not in found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            known = ", ".join(map(printable, sorted(found)[:SHOWN])) + more
            raise UserError(
                f"{printable(str(folder))} has no scene {printable(name)}, expected "
                f"one of {known}"
            )
    grids = [_open(found[name]) for name in names or sorted(found)]
    for grid in grids[1:]:
        if grid.unit != grids[0].unit:
            raise UserError(
                f"{printable(grid.path.name)} has a vector for each {grid.unit}, "
                f"{printable(grids[0].path.name)} for each {grids[0].unit}: give "
                "the names of scenes of one of them"
            )
        check_same(grids[0].path, grids[0].emb, grid.path, grid.emb)
    return grids


def _open(path: Path) -> EmbeddedGrid:
    unit_ = UNITS[path.suffix]
    emb, crs = (_table_facts if unit_ == CHIP else _raster_facts)(path)
    try:
        facts = emb["scene"]
        height, width = map(int, facts["shape"])
        numbers = [float(x) for x in facts["transform"]]
        gsd_y, gsd_x = map(float, facts["gsd"])
        date, source = (facts["datetime"] or "")[:10], str(facts["source"])
        if unit_ == CHIP:
            layout = emb["emb:chip_layout"]
            (high, wide), stride = layout["chip_size"], tuple(layout["stride"])
            down = np.array(window_starts(height, high, stride[0])) + high / 2
            across = np.array(window_starts(width, wide, stride[1])) + wide / 2
        else:
            patch = int(emb["emb:runtime_parameters"]["patch_size"])
            stride = (patch, patch)
            down, across = (
                (np.arange(-(-axis // patch)) + 0.5) * patch for axis in (height, width)
            )
        from affine import Affine

        transform = Affine(*numbers)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{printable(str(path))} does not say where its scene lies "
            f"({printable(reason)}): embed it again"
        ) from None
    if transform.is_identity or transform.is_degenerate:
        crs = None
    return EmbeddedGrid(
        path=path,
        unit=unit_,
        emb=emb,
        down=down,
        across=across,
        stride=stride,
        pixels=(height, width),
        transform=transform,
        crs=crs,
        gsd=_gsd(transform, crs, (height, width)) or (gsd_y, gsd_x),
        date=date,
        source=source,
    )


def _table_facts(path: Path) -> tuple[dict[str, Any], str | None]:
    stored = Stored.open(path.parent, [path])
    if not stored.count:
        raise UserError(f"{printable(str(path))} has no chips: move it away")
    (crs,) = stored.rows([0], ["crs"]).column("crs").to_pylist()
    return stored.embs[0], crs


def _raster_facts(path: Path) -> tuple[dict[str, Any], str | None]:
    name = str(path.absolute())
    with _readable(path), gdal.borrowed(gdal.Name(name)) as dataset:
        told, count = dataset.tags().get(EMB.upper()), dataset.count
        crs = dataset.crs.to_string() if dataset.crs else None
    try:
        emb = json.loads(told)
        parameters = emb["emb:runtime_parameters"]
        good = emb["emb:dimensions"] == count and emb["model"]["digest"] is not None
        good = good and None not in (parameters["pooling"], parameters["size"])
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(
            f"{printable(str(path))} is no GeoTIFF of xsmae embed --unit=token: move "
            "it away"
        )
    return emb, crs


def _gsd(transform, crs, shape) -> tuple[float, float] | None:
    """Metres per pixel at the centre; None where the CRS does not say it."""
    if crs is None:
        return None
    height, width = shape
    try:
        with gdal.gdal(crs):
            found = ground_size(transform, crs, height / 2, width / 2)
    except BadImageError:  # a CRS that is none of Earth's
        return None
    good = np.isfinite(found).all() and (found > 0).all()
    return tuple(map(float, found)) if good else None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except BadImageError as error:
        raise UserError(
            f"{error}: embed the scene of {printable(path.name)} again"
        ) from None
