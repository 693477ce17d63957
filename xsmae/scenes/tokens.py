"""Vectors of the patches of a whole scene: a grid, as a Cloud-Optimized GeoTIFF.

Windows are encoded, and each gives the vectors of its patches. Where windows overlap, a
patch is taken from the window whose centre is nearer, so that it sees more around it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.data.raster import Raster
from xsmae.data.raster_write import SIDE, Layers, write_cog
from xsmae.errors import UserError
from xsmae.scenes.chip_files import enough, footer
from xsmae.scenes.chip_table import SceneFacts
from xsmae.scenes.chips import ChipReader, panel_shape, panels, plan_tokens
from xsmae.scenes.embed import READERS, Plan, Progress, job_of, warn_outside
from xsmae.scenes.encoding import Groups, ahead_of
from xsmae.scenes.finish import EMB, Made, finish
from xsmae.scenes.inputs import reading_of
from xsmae.scenes.manifest import Manifest
from xsmae.scenes.stac import item
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    import affine
    from jaxtyping import Float

BLOCK = 64 * 2**20  # bytes of a block of all bands, at most where 128 pixels allow it
NODATA = -128  # of int8; float32 has NaN


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Finished rows of patches: the first of them, and vectors, NaN without a value."""

    first: int
    vectors: Float[np.ndarray, "rows columns width"]


def token_reader(encoder: Encoder, raster: Raster, plan: Plan) -> ChipReader:
    """The windows of a scene as the encoder reads them; UserError if it cannot."""
    reading = reading_of("the encoder", encoder.bands, raster, plan.missing_bands)
    grid = plan_tokens(
        raster,
        chip_size=plan.chip_size,
        stride=plan.stride,
        patch_size=encoder.info["architecture"]["patch_size"],
    )
    return ChipReader.of(raster, reading, grid)


def owned(starts: tuple[int, ...], size: int, patch: int) -> list[int]:
    """The first patch of each window on an axis, and the end: each has one owner."""
    middles = [
        (before + after + size) // (2 * patch)
        for before, after in itertools.pairwise(starts)
    ]
    return [0, *middles, (starts[-1] + size) // patch]


def token_rows(
    reader: ChipReader,
    groups: Groups,
    *,
    patch: int,
    min_valid: float,
    first_row: int = 0,
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[TokenRows]:
    """The vectors of all patches, a row of windows at a time, from row `first_row`.

    groups: without pooling. Raises KeyboardInterrupt once `should_stop()` is true.
    """
    grid = reader.grid
    down, across = (owned(x, grid.size[0], patch) for x in (grid.tops, grid.lefts))
    rows, columns = grid.shape
    _, wide = panel_shape(grid, reader.raster, len(reader.reading.bands.names))
    found: dict[int, TokenRows] = {}
    valid: dict[tuple[int, int], np.ndarray] = {}
    progress = Progress(rows * columns, first_row * columns, say)

    def chips(pool):
        last = None
        todo = panels(grid, (1, wide), first_row)

        def read(panel):
            return reader.read_patches(panel, patch)

        for panel, (images, parts) in ahead_of(todo, read, pool, READERS):
            if should_stop():
                return
            row = panel.rows[0]
            if row != last:
                if last is not None:
                    yield (last,), None, None
                shape = down[row + 1] - down[row], across[-1], groups.width
                nothing = np.full(shape, np.nan, np.float32)
                found[row], last = TokenRows(down[row], nothing), row
            places = np.array(panel.chips)
            gsd = reader.gsd(grid.places(*places.T))
            for key, image, own, part in zip(
                panel.chips, images, gsd, parts, strict=True
            ):
                if enough(part, min_valid).any():
                    valid[key] = part
                    yield key, image, own
        if last is not None:
            yield (last,), None, None

    next_row = first_row
    with ThreadPoolExecutor(READERS) as pool:
        for keys, vectors in groups.run(chips(pool)):
            if len(keys[0]) == 1:
                next_row = keys[0][0] + 1
                yield found.pop(keys[0][0])
                continue
            if not np.isfinite(vectors).all():
                raise UserError(
                    "the encoder gives vectors that are not finite in the rows from "
                    f"{grid.tops[keys[0][0]]} on: give another encoder"
                )
            for (row, column), tokens in zip(keys, vectors, strict=True):
                part = valid.pop((row, column))
                tokens = tokens.reshape(*part.shape, -1)
                tokens = np.where(enough(part, min_valid)[..., None], tokens, np.nan)
                top, left = grid.tops[row] // patch, grid.lefts[column] // patch
                y = slice(down[row] - top, down[row + 1] - top)
                x = slice(across[column] - left, across[column + 1] - left)
                place = slice(across[column], across[column + 1])
                found[row].vectors[:, place] = tokens[y, x]
            progress(keys[-1][0] * columns + keys[-1][1] + 1)
    if next_row < rows:
        raise KeyboardInterrupt


def embed_tokens(
    encoder: Encoder,
    groups: Groups,
    raster: Raster,
    manifest: Manifest,
    *,
    name: str,
    source: str,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write the patches of a scene as a GeoTIFF and its item, like `embed_scene`."""
    reader = token_reader(encoder, raster, plan)
    warn_outside(encoder, reader, say)
    job = job_of("token", encoder, reader, plan, source)
    patch = encoder.info["architecture"]["patch_size"]
    down, across = (
        owned(x, reader.grid.size[0], patch)
        for x in (reader.grid.tops, reader.grid.lefts)
    )

    def make(folder: Path) -> Made:
        shapes = {"vectors": (groups.width, 4 * across[-1])}
        strips = Strips(folder, f"{job} in groups of {groups.size}", shapes)
        if strips.next_row:
            say(f"resumes at row {strips.next_row} of {down[-1]} rows of patches")
        for rows in token_rows(
            reader,
            groups,
            patch=patch,
            min_valid=plan.min_valid,
            first_row=down.index(strips.next_row),
            say=say,
            should_stop=should_stop,
        ):
            bands = np.ascontiguousarray(rows.vectors.transpose(0, 2, 1))
            strips.add({"vectors": bands.view(np.uint8)})
            strips.commit(rows.first + len(bands))
        emb = _footer(encoder, reader, plan, job, patch)
        made, count = _write(folder, name, strips, raster, plan, emb, patch)
        size = (patch, patch)
        facts = SceneFacts(name, source, plan.time, raster.crs, size)
        return Made(
            made,
            count,
            lambda target: item(raster, facts, emb, target, encoder=plan.encoder),
        )

    target = manifest.path.parent / f"{name}.tif"
    return finish(manifest, target, job, source, make)


def _footer(encoder, reader, plan, job, patch) -> dict[str, Any]:
    emb = footer(
        encoder,
        reader,
        pooling="none",
        dtype=plan.dtype,
        min_valid=plan.min_valid,
        job=job,
    )
    emb["emb:type"] = "pixel"
    emb["emb:chip_layout"]["last_chip"] = "ends with the last patch of the scene"
    emb["emb:runtime_parameters"]["patch_size"] = patch
    if plan.dtype == "int8":
        emb["emb:quantization"]["scale_column"] = "the scale of each band of the file"
    return emb


def _write(
    folder: Path,
    name: str,
    strips: Strips,
    raster: Raster,
    plan: Plan,
    emb: dict[str, Any],
    patch: int,
) -> tuple[Path, int]:
    """The GeoTIFF in the folder, and how many patches have a vector."""
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
    made = folder / f"{name}.tif"
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
