"""Embeddings of a scene as arrays: `xsmae.embed`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.data.raster import Raster, open_raster
from xsmae.errors import UserError
from xsmae.scenes.chip_files import enough
from xsmae.scenes.chips import Length
from xsmae.scenes.embed import Chips, Plan
from xsmae.scenes.encoding import Groups
from xsmae.scenes.rows import encoded
from xsmae.weights.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    import affine
    import xarray
    from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class SceneEmbeddings:
    """The vectors of a scene's chips, as a grid.

    vectors: NaN for chips with too few valid pixels. valid: the valid part of each
    chip, 0 to 1. tops, lefts: the first pixel of each row and column of chips; the last
    ones end with the scene. size: height and width of a chip in pixels. gsd: metres per
    pixel (y, x) that the encoder got. transform: of the scene's pixels (x, y) to its
    CRS; it places the pixel (lefts[j], tops[i]), the first corner of chip (i, j).
    """

    vectors: Float[np.ndarray, "rows columns width"]
    valid: Float[np.ndarray, "rows columns"]
    tops: Int[np.ndarray, " rows"]
    lefts: Int[np.ndarray, " columns"]
    size: tuple[int, int]
    gsd: Float[np.ndarray, "rows columns 2"]
    transform: affine.Affine
    crs: str | None

    def to_xarray(self) -> xarray.DataArray:
        """The vectors with the dimensions row, col and feature; needs xarray.

        The coordinates row and col are `tops` and `lefts`, and valid_fraction is
        `valid`. With a CRS, x and y are the centres of the chips in its units: along
        col and row, or of each chip where the grid is rotated. The attributes are
        transform (six numbers), chip_size, and crs if it is known.
        """
        try:
            import xarray
        except ImportError:
            raise UserError("to_xarray() needs xarray: pip install xarray") from None
        attrs = {"transform": tuple(self.transform[:6]), "chip_size": self.size}
        if self.crs is not None:
            attrs["crs"] = self.crs
        return xarray.DataArray(
            self.vectors,
            dims=("row", "col", "feature"),
            coords={
                "row": self.tops,
                "col": self.lefts,
                "valid_fraction": (("row", "col"), self.valid),
                **self._centres(),
            },
            attrs=attrs,
            name="embedding",
        )

    def _centres(self) -> dict[str, tuple[Any, np.ndarray]]:
        """x and y in the CRS with their dimensions; nothing without a CRS."""
        if self.crs is None:
            return {}
        a, b, c, d, e, f = self.transform[:6]
        down = self.tops + self.size[0] / 2
        across = self.lefts + self.size[1] / 2
        if b == d == 0:
            return {"x": ("col", a * across + c), "y": ("row", e * down + f)}
        down, across = np.meshgrid(down, across, indexing="ij")
        x, y = a * across + b * down + c, d * across + e * down + f
        return {"x": (("row", "col"), x), "y": (("row", "col"), y)}


def embed(
    encoder: Encoder | str | os.PathLike,
    scene: Raster | str | os.PathLike,
    *,
    chip_size: int | str | None = None,
    stride: int | str | None = None,
    size: int | None = None,
    pooling: str | None = None,
    min_valid: float = 0.5,
    missing_bands: str = "refuse",
    batch_size: int = 64,
    **options: Any,
) -> SceneEmbeddings:
    """A vector for each chip of a scene, in memory; `xsmae embed` writes files.

    encoder: loaded, or its folder. scene: an opened raster, or its path or URL, which
    `open_raster` gets with `options`, such as sensor="sentinel2_l2a". chip_size and
    stride: pixels, or metres such as "500m"; by default the size of training, side by
    side. size: pixels that the encoder gets, by default those of a chip in pixels, else
    the size of training. pooling: `cls` or `mean`, by default the encoder's own.
    min_valid: chips with a smaller part of valid pixels are NaN.

    Raises UserError if the encoder cannot read the scene, and BadImageError if a part
    of the scene cannot be read.
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(Path(encoder))
    lengths = [
        None if value is None else Length.parse(str(value), name)
        for name, value in (("chip_size", chip_size), ("stride", stride))
    ]
    plan = Plan(
        *lengths,
        side=size,
        pooling=pooling,
        min_valid=min_valid,
        missing_bands=missing_bands,
    ).of(encoder)
    if isinstance(scene, Raster):
        if options:
            raise UserError(
                f"{', '.join(options)} given with an opened raster: give them to "
                "open_raster"
            )
        return _embed(encoder, scene, plan, batch_size)
    with open_raster(scene, **options) as raster:
        return _embed(encoder, raster, plan, batch_size)


def _embed(
    encoder: Encoder, raster: Raster, plan: Plan, batch_size: int
) -> SceneEmbeddings:
    layout = Chips.of(encoder, raster, plan)
    reader = layout.reader
    groups = Groups(encoder, pooling=plan.pooling, batch_size=batch_size)
    found = list(encoded(layout, groups, rows=range(reader.grid.shape[0])))
    vectors = np.concatenate([rows.vectors for rows in found])
    valid = np.concatenate([rows.valid for rows in found])
    vectors[~enough(valid, plan.min_valid)] = np.nan
    shape = reader.grid.shape
    places = reader.grid.places(*np.indices(shape).reshape(2, -1))
    return SceneEmbeddings(
        vectors=vectors,
        valid=valid,
        tops=np.array(reader.grid.tops),
        lefts=np.array(reader.grid.lefts),
        size=reader.grid.size,
        gsd=reader.gsd(places).reshape(*shape, 2),
        transform=raster.transform,
        crs=raster.crs,
    )
