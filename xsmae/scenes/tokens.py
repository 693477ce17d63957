"""Vectors of the patches of a whole scene: a grid, as a Cloud-Optimized GeoTIFF.

Windows are encoded, and each gives the vectors of its patches. Where windows overlap, a
patch is taken from the window whose centre is nearer, so that it sees more around it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xsmae.data.raster import Raster
from xsmae.data.raster_write import SIDE, Layers, write_cog
from xsmae.errors import UserError
from xsmae.scenes.chip_files import enough, footer
from xsmae.scenes.chips import ChipReader, Panel, panel_shape, plan_tokens
from xsmae.scenes.embed import Plan, Scene
from xsmae.scenes.finish import EMB, Made
from xsmae.scenes.inputs import reading_of
from xsmae.scenes.rows import Rows
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    import affine
    from jaxtyping import Float

    from xsmae.scenes.rows import Stored

BLOCK = 64 * 2**20  # bytes of a block of all bands, at most where 128 pixels allow it
NODATA = -128  # of int8; float32 has NaN


def owned(starts: tuple[int, ...], size: int, patch: int) -> list[int]:
    """The first patch of each window on an axis, and the end: each has one owner."""
    middles = [
        (before + after + size) // (2 * patch)
        for before, after in itertools.pairwise(starts)
    ]
    return [0, *middles, (starts[-1] + size) // patch]


@dataclasses.dataclass(frozen=True)
class Patches:
    """Vectors of patches: a `Layout` whose stored rows are rows of patches.

    down, across: see `owned`. A row of windows is finished on its own.
    """

    unit: ClassVar = "token"
    suffix: ClassVar = ".tif"
    rows_are: ClassVar = "rows of patches"

    reader: ChipReader
    width: int
    min_valid: float
    patch: int
    down: list[int]
    across: list[int]
    step: int = 1

    @classmethod
    def of(cls, encoder: Encoder, raster: Raster, plan: Plan) -> Patches:
        """The patches of a scene; UserError if the encoder cannot read it."""
        reading = reading_of("the encoder", encoder.bands, raster, plan.missing_bands)
        shape = encoder.info["architecture"]
        patch, width = shape["patch_size"], shape["embed_dim"]
        grid = plan_tokens(
            raster, chip_size=plan.chip_size, stride=plan.stride, patch_size=patch
        )
        down, across = (owned(x, grid.size[0], patch) for x in (grid.tops, grid.lefts))
        reader = ChipReader.of(raster, reading, grid)
        return cls(reader, width, plan.min_valid, patch, down, across)

    @property
    def panel(self) -> tuple[int, int]:
        reader = self.reader
        bands = len(reader.reading.bands.names)
        return 1, panel_shape(reader.grid, reader.raster, bands)[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"vectors": (self.width, 4 * self.across[-1])}

    def read(self, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
        return self.reader.read_patches(panel, self.patch)

    def kept(self, valid: Float[np.ndarray, "down across"]) -> bool:
        return bool(enough(valid, self.min_valid).any())

    def empty(self, rows: range) -> Rows:
        high = self.down[rows.stop] - self.down[rows.start]
        shape = high, self.across[-1], self.width
        return Rows(rows, np.full(shape, np.nan, np.float32), None)

    def put(self, rows: Rows, place: tuple[int, int], valid, vector) -> None:
        if vector is None:
            return
        row, column = place
        vector = vector.reshape(*valid.shape, -1)
        vector = np.where(enough(valid, self.min_valid)[..., None], vector, np.nan)
        grid, down, across = self.reader.grid, self.down, self.across
        top, left = grid.tops[row] // self.patch, grid.lefts[column] // self.patch
        y = slice(down[row] - top, down[row + 1] - top)
        x = slice(across[column] - left, across[column + 1] - left)
        rows.vectors[:, across[column] : across[column + 1]] = vector[y, x]

    def stored(self, rows: Rows) -> Stored:
        bands = np.ascontiguousarray(rows.vectors.transpose(0, 2, 1))
        return {"vectors": bands.view(np.uint8)}

    def stored_row(self, row: int) -> int:
        return self.down[row]

    def write(self, folder: Path, strips: Strips, scene: Scene) -> Made:
        """The GeoTIFF, in the folder."""
        emb = _footer(self, scene)
        made, count = _write(folder, strips, scene, emb, self.patch)
        facts = scene.facts((self.patch, self.patch))
        return scene.made(made, count, facts, emb)


def _footer(patches: Patches, scene: Scene) -> dict[str, Any]:
    emb = footer(
        scene.encoder,
        patches.reader,
        pooling="none",
        dtype=scene.plan.dtype,
        min_valid=patches.min_valid,
        job=scene.job,
        source=scene.source,
        time=scene.plan.time,
    )
    emb["emb:type"] = "pixel"
    emb["emb:chip_layout"]["last_chip"] = "ends with the last patch of the scene"
    emb["emb:runtime_parameters"]["patch_size"] = patches.patch
    if scene.plan.dtype == "int8":
        emb["emb:quantization"]["scale_column"] = "the scale of each band of the file"
    return emb


def _write(
    folder: Path, strips: Strips, scene: Scene, emb: dict[str, Any], patch: int
) -> tuple[Path, int]:
    """The GeoTIFF in the folder, and how many patches have a vector."""
    raster, plan = scene.raster, scene.plan
    vectors = strips.rows("vectors").view(np.float32)
    bands = vectors.shape[1]
    count = sum(int(np.isfinite(row[0]).sum()) for row in vectors)
    if not count:
        raise UserError(
            f"no patch has {plan.min_valid:.0%} valid pixels: lower --min_valid"
        )
    scale, nodata = np.ones(bands), np.nan
    if plan.dtype == "int8":
        vectors, scale = _quantized(folder / "numbers.raw", vectors)
        nodata = NODATA
    side = SIDE
    while side > 128 and side**2 * bands * vectors.dtype.itemsize > BLOCK:
        side //= 2
    layers = Layers(
        vectors,
        [f"feature_{i}" for i in range(bands)],
        resampling="AVERAGE",
        tags={EMB.upper(): json.dumps(emb)},
        scale=scale,
        nodata=nodata,
        transform=_enlarged(raster.transform, patch),
        side=side,
    )
    made = folder / f"{scene.name}.tif"
    write_cog(made, layers, like=raster, scratch=folder / "scratch.tif")
    return made, count


def _enlarged(transform: affine.Affine, patch: int) -> affine.Affine:
    """The transform of patches from that of pixels."""
    a, b, c, d, e, f = transform[:6]
    return type(transform)(a * patch, b * patch, c, d * patch, e * patch, f)


def _quantized(
    path: Path, vectors: Float[np.ndarray, "height bands width"]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of 8 bits in a file, and the scale of each band."""
    greatest = np.zeros(vectors.shape[1], np.float32)
    for row in vectors:
        np.fmax(greatest, np.nan_to_num(np.abs(row)).max(axis=1), out=greatest)
    scale = np.where(greatest > 0, greatest, 127).astype(np.float32) / np.float32(127)
    numbers = np.memmap(path, np.int8, "w+", shape=vectors.shape)
    for target, row in zip(numbers, vectors, strict=True):
        found = np.clip(np.rint(row / scale[:, None]), -127, 127)
        target[:] = np.where(np.isnan(found), NODATA, found).astype(np.int8)
    return numbers, scale
