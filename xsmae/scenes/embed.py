"""Embeddings of whole scenes: a vector for each chip, as a table."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.raster import Raster
from xsmae.errors import UserError
from xsmae.scenes.chip_files import enough, footer, write_chips
from xsmae.scenes.chip_table import SceneFacts
from xsmae.scenes.chips import ChipReader, Length, panel_shape, panels, plan_grid
from xsmae.scenes.encoding import Groups, ahead_of
from xsmae.scenes.finish import Made, finish
from xsmae.scenes.inputs import facts_of, reading_of
from xsmae.scenes.manifest import Manifest
from xsmae.scenes.stac import item
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import Encoder, outside_training

if TYPE_CHECKING:
    from jaxtyping import Float

SCHEMA = 1
PART = 512  # chips, at least, of the rows that are finished together
EVERY = 5.0  # seconds between progress lines
READERS = min(os.cpu_count() or 1, 4)  # threads


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute of each scene.

    chip_size, stride, side: see `plan_grid`; chip_size None: the encoder's image size.
    pooling: `cls` or `mean`, None: the encoder's own. min_valid: the part of a chip's
    pixels that must have a value. dtype: of the stored vectors. time: of the image,
    None if unknown. missing_bands: one of `MISSING_BANDS`. encoder: its folder, for
    links.
    """

    chip_size: Length | None = None
    stride: Length | None = None
    side: int | None = None
    pooling: str | None = None
    min_valid: float = 0.5
    dtype: str = "float32"
    time: datetime.datetime | None = None
    missing_bands: str = "refuse"
    encoder: str = ""

    def of(self, encoder: Encoder) -> Plan:
        """The plan with the encoder's own size and pooling where it says none."""
        size = self.chip_size or Length(encoder.info["image_size"], metres=False)
        pooling = self.pooling or encoder.info["pooling"]
        return dataclasses.replace(self, chip_size=size, pooling=pooling)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Finished rows of the grid of chips.

    first: the first of them. vectors: 0 for chips that are left out. valid: the valid
    part of each chip.
    """

    first: int
    vectors: Float[np.ndarray, "rows columns width"]
    valid: Float[np.ndarray, "rows columns"]


def reader_of(encoder: Encoder, raster: Raster, plan: Plan) -> ChipReader:
    """The chips of a scene as the encoder reads them; UserError if it cannot."""
    reading = reading_of("the encoder", encoder.bands, raster, plan.missing_bands)
    grid = plan_grid(
        raster,
        chip_size=plan.chip_size,
        stride=plan.stride,
        side=plan.side,
        patch_size=encoder.info["architecture"]["patch_size"],
        image_size=encoder.info["image_size"],
    )
    return ChipReader.of(raster, reading, grid)


def encoded_rows(
    reader: ChipReader,
    groups: Groups,
    *,
    min_valid: float,
    first_row: int = 0,
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Rows]:
    """The vectors of a grid from `first_row`, some rows at a time.

    Reading, encoding and the caller's work overlap. Once `should_stop()` is true, the
    chips on their way are finished; if rows are missing, it raises KeyboardInterrupt.
    """
    rows, columns = reader.grid.shape
    shape = panel_shape(reader.grid, reader.raster, len(reader.reading.bands.names))
    step = -(-PART // (columns * shape[0])) * shape[0]
    parts: dict[int, Rows] = {}
    progress = Progress(rows * columns, first_row * columns, say)

    def rows_from(first):
        many = min(step, rows - first)
        zeros = np.zeros((many, columns, groups.width), np.float32)
        return Rows(first, zeros, np.zeros((many, columns), np.float32))

    def chips(pool):
        last = None
        todo = panels(reader.grid, shape, first_row)
        for panel, (images, valid) in ahead_of(todo, reader.read, pool, READERS):
            if should_stop():
                return
            part = panel.rows[0] // step
            if part != last:
                if last is not None:
                    yield (last,), None, None
                parts[part] = rows_from(part * step)
                last = part
            row, column = np.array(panel.chips).T
            parts[part].valid[row - part * step, column] = valid
            gsd = reader.gsd(reader.grid.places(row, column))
            for *found, good in zip(panel.chips, images, gsd, valid, strict=True):
                if enough(good, min_valid):
                    (row, column), image, own = found
                    yield (part, row - part * step, column), image, own
        if last is not None:
            yield (last,), None, None

    next_row = first_row
    with ThreadPoolExecutor(READERS) as pool:
        for keys, vectors in groups.run(chips(pool)):
            if len(keys[0]) == 1:
                found = parts.pop(keys[0][0])
                next_row = found.first + len(found.valid)
                yield found
                continue
            part, row, column = keys[-1]
            if not np.isfinite(vectors).all():
                raise UserError(
                    "the encoder gives vectors that are not finite up to row "
                    f"{reader.grid.tops[part * step + row]} of the scene: give another "
                    "encoder"
                )
            for (part, row, column), vector in zip(keys, vectors, strict=True):
                parts[part].vectors[row, column] = vector
            progress((part * step + row) * columns + column + 1)
    if next_row < rows:
        raise KeyboardInterrupt


class Progress:
    """Says every few seconds how many chips are done, and the time left."""

    def __init__(self, total: int, start: int, say: Callable[[str], None]):
        self.total, self.start, self.say = total, start, say
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < EVERY or done >= self.total:
            return
        self.last = now
        rate = (done - self.start) / (now - self.begin)
        left = round((self.total - done) / max(rate, 1e-9))
        self.say(
            f"chip {done} of {self.total}, {rate:.0f} a second, {left // 3600}:"
            f"{left // 60 % 60:02}:{left % 60:02} left"
        )


def embed_scene(
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
    """Write the table of a scene and its item; False if they were there already.

    A scene that was not finished is resumed, and ends with the same bytes. Memory does
    not grow with the scene. groups: of the plan's pooling. manifest: lists the files,
    which are written beside it. name: of the files. source: as the user calls it. plan:
    from `Plan.of`.

    Raises:
      UserError: the encoder cannot read the raster, no chip has enough pixels, a file
        cannot be written, or another one is there.
      BadImageError: a part of the raster cannot be read.
      KeyboardInterrupt: once `should_stop()` is true.
    """
    reader = reader_of(encoder, raster, plan)
    warn_outside(encoder, reader, say)
    job = job_of("chip", encoder, reader, plan, source)

    def make(folder: Path) -> Made:
        strips = _strips(folder, job, reader, groups)
        if strips.next_row:
            rows = reader.grid.shape[0]
            say(f"resumes at row {strips.next_row} of {rows} rows of chips")
        for rows in encoded_rows(
            reader,
            groups,
            min_valid=plan.min_valid,
            first_row=strips.next_row,
            say=say,
            should_stop=should_stop,
        ):
            strips.add({n: as_bytes(getattr(rows, n)) for n in strips.shapes})
            strips.commit(rows.first + len(rows.valid))
        facts = SceneFacts(name, source, plan.time, raster.crs, reader.grid.size)
        emb = footer(
            encoder,
            reader,
            pooling=plan.pooling,
            dtype=plan.dtype,
            min_valid=plan.min_valid,
            job=job,
        )
        made = folder / f"{name}.parquet"
        count = write_chips(
            made,
            strips,
            reader,
            facts,
            dtype=plan.dtype,
            min_valid=plan.min_valid,
            emb=emb,
            say=say,
        )
        return Made(
            made,
            count,
            lambda target: item(raster, facts, emb, target, encoder=plan.encoder),
        )

    target = manifest.path.parent / f"{name}.parquet"
    return finish(manifest, target, job, source, make)


def warn_outside(
    encoder: Encoder, reader: ChipReader, say: Callable[[str], None]
) -> None:
    """Say it if the GSD of the first chip is outside the range of training."""
    gsd = reader.gsd(reader.grid.places(np.array([0]), np.array([0])))[0]
    if outside_training(encoder.info, gsd.min(), gsd.max()):
        low, high = encoder.info["gsd_range"]
        say(
            f"the encoder was pretrained at {low:g} to {high:g} m per pixel, the chips "
            f"have {gsd[0]:g} x {gsd[1]:g} m: the vectors may be poor"
        )


def _strips(folder: Path, job: str, reader: ChipReader, groups: Groups) -> Strips:
    """The finished rows of the grid; those of other groups may have other bits."""
    columns = reader.grid.shape[1]
    shapes = {"vectors": (columns, 4 * groups.width), "valid": (columns, 4)}
    return Strips(folder, f"{job} in groups of {groups.size}", shapes)


def as_bytes(numbers: Float[np.ndarray, "rows columns *width"]) -> np.ndarray:
    """float32 as the bytes that `Strips` keeps."""
    return numbers.reshape(*numbers.shape[:2], -1).view(np.uint8)


def job_of(
    unit: str, encoder: Encoder, reader: ChipReader, plan: Plan, source: str
) -> str:
    """16 hexadecimal digits of what the vectors of a scene are computed from."""
    grid, time = reader.grid, plan.time and plan.time.isoformat()
    told = [
        SCHEMA, unit, encoder.digest, facts_of(reader.raster), reader.reading.places,
        grid.size, grid.stride, grid.side, plan.pooling, plan.min_valid, plan.dtype,
        time, source,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
