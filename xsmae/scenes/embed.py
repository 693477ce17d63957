"""Embeddings of whole scenes: a vector for each chip, as a table."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xsmae.data.raster import Raster
from xsmae.scenes.chip_files import enough, footer, write_chips
from xsmae.scenes.chip_table import SceneFacts
from xsmae.scenes.chips import ChipReader, Length, Panel, panel_shape, plan_grid
from xsmae.scenes.finish import Made, finish
from xsmae.scenes.inputs import facts_of, reading_of
from xsmae.scenes.manifest import Manifest
from xsmae.scenes.rows import Compute, Progress, Rows, as_bytes
from xsmae.scenes.stac import item
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import Encoder, outside_training

if TYPE_CHECKING:
    from xsmae.scenes.rows import Stored

SCHEMA = 2
PART = 512  # chips, at least, of the rows that are finished together


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute of each scene.

    chip_size, stride, side: see `plan_grid`; chip_size None: the encoder's image size.
    pooling: `cls` or `mean`, None: the encoder's own. min_valid: the part of a chip's
    pixels that must have a value. dtype: of the stored vectors. time: of the image,
    None if unknown; end: of an interval that begins at `time`. missing_bands: one of
    `MISSING_BANDS`. encoder: its folder, for links.
    """

    chip_size: Length | None = None
    stride: Length | None = None
    side: int | None = None
    pooling: str | None = None
    min_valid: float = 0.5
    dtype: str = "float32"
    time: datetime.datetime | None = None
    end: datetime.datetime | None = None
    missing_bands: str = "refuse"
    encoder: str = ""

    def of(self, encoder: Encoder) -> Plan:
        """The plan with the encoder's own size and pooling where it says none."""
        size = self.chip_size or Length(encoder.info["image_size"], metres=False)
        pooling = self.pooling or encoder.info["pooling"]
        return dataclasses.replace(self, chip_size=size, pooling=pooling)


@dataclasses.dataclass(frozen=True)
class Chips:
    """Vectors of chips: a `Layout` whose rows are those of the grid."""

    unit: ClassVar = "chip"
    suffix: ClassVar = ".parquet"
    rows_are: ClassVar = "rows of chips"

    reader: ChipReader
    width: int
    min_valid: float
    step: int

    @classmethod
    def of(cls, encoder: Encoder, raster: Raster, plan: Plan) -> Chips:
        """The chips of a scene; UserError if the encoder cannot read it."""
        reading = reading_of("the encoder", encoder.bands, raster, plan.missing_bands)
        shape = encoder.info["architecture"]
        grid = plan_grid(
            raster,
            chip_size=plan.chip_size,
            stride=plan.stride,
            side=plan.side,
            patch_size=shape["patch_size"],
            image_size=encoder.info["image_size"],
        )
        reader = ChipReader.of(raster, reading, grid)
        high = _panel(reader)[0]
        step = -(-PART // (grid.shape[1] * high)) * high
        return cls(reader, shape["embed_dim"], plan.min_valid, step)

    @property
    def panel(self) -> tuple[int, int]:
        return _panel(self.reader)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        columns = self.reader.grid.shape[1]
        return {"vectors": (columns, 4 * self.width), "valid": (columns, 4)}

    def read(self, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
        return self.reader.read(panel)

    def kept(self, valid: np.floating) -> bool:
        return bool(enough(valid, self.min_valid))

    def empty(self, rows: range) -> Rows:
        shape = len(rows), self.reader.grid.shape[1]
        zeros = np.zeros((*shape, self.width), np.float32)
        return Rows(rows, zeros, np.zeros(shape, np.float32))

    def put(self, rows: Rows, place: tuple[int, int], valid, vector) -> None:
        row, column = place[0] - rows.rows.start, place[1]
        rows.valid[row, column] = valid
        if vector is not None:
            rows.vectors[row, column] = vector

    def stored(self, rows: Rows) -> Stored:
        return {name: as_bytes(getattr(rows, name)) for name in self.shapes}

    def stored_row(self, row: int) -> int:
        return row

    def write(self, folder: Path, strips: Strips, scene: Scene) -> Made:
        """The table, in the folder."""
        facts = scene.facts(self.reader.grid.size)
        emb = footer(
            scene.encoder,
            self.reader,
            pooling=scene.plan.pooling,
            dtype=scene.plan.dtype,
            min_valid=self.min_valid,
            job=scene.job,
            source=scene.source,
            time=scene.plan.time,
        )
        made = folder / f"{scene.name}{self.suffix}"
        count = write_chips(
            made,
            strips,
            self.reader,
            facts,
            dtype=scene.plan.dtype,
            min_valid=self.min_valid,
            emb=emb,
            say=scene.say,
        )
        return scene.made(made, count, facts, emb)


def _panel(reader: ChipReader) -> tuple[int, int]:
    return panel_shape(reader.grid, reader.raster, len(reader.reading.bands.names))


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene whose vectors are finished, for the one who writes its file.

    name: of the files. source: as the user calls it. job: see `job_of`.
    """

    encoder: Encoder
    raster: Raster
    plan: Plan
    name: str
    source: str
    job: str
    say: Callable[[str], None]

    def facts(self, size: tuple[int, int]) -> SceneFacts:
        """What its chips share, `size` (height, width) pixels each."""
        plan, crs = self.plan, self.raster.crs
        return SceneFacts(self.name, self.source, plan.time, crs, size, plan.end)

    def made(
        self, path: Path, rows: int, facts: SceneFacts, emb: dict[str, Any]
    ) -> Made:
        """What `finish` gets of a file: how many rows it has, and its item."""
        return Made(
            path,
            rows,
            lambda target: item(
                self.raster, facts, emb, target, encoder=self.plan.encoder
            ),
        )


def embed_scene(
    layout_of: Callable[[Encoder, Raster, Plan], Any],
    encoder: Encoder,
    compute: Compute,
    raster: Raster,
    manifest: Manifest,
    *,
    name: str,
    source: str,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write the file of a scene and its item; False if they were there already.

    A scene that was not finished is resumed, and ends with the same bytes. Memory does
    not grow with the scene. layout_of: `Chips.of` or `Patches.of`. manifest: lists the
    files, which are written beside it. name: of the files. source: as the user calls
    it. plan: from `Plan.of`.

    Raises:
      UserError: the encoder cannot read the raster, nothing has enough pixels, a file
        cannot be written, or another one is there.
      BadImageError: a part of the raster cannot be read.
      KeyboardInterrupt: once `should_stop()` is true.
    """
    layout = layout_of(encoder, raster, plan)
    warn_outside(encoder, layout.reader, say)
    warn_timeless(plan, say)
    job = job_of(layout, encoder, plan, source)

    def make(folder: Path) -> Made:
        # Other groups may give other bits.
        text = f"{job} in groups of {compute.size}"
        strips = Strips(folder, text, layout.shapes)
        high, columns = layout.reader.grid.shape
        ends = [layout.stored_row(row) for row in range(high + 1)]
        first = ends.index(strips.next_row)
        if first:
            say(f"resumes at row {strips.next_row} of {ends[-1]} {layout.rows_are}")
        for rows, stored in compute.stored(
            layout,
            job,
            range(first, high),
            progress=Progress(high * columns, first * columns, say),
            should_stop=should_stop,
        ):
            strips.add(stored)
            strips.commit(ends[rows.stop])
        scene = Scene(encoder, raster, plan, name, source, job, say)
        return layout.write(folder, strips, scene)

    target = manifest.path.parent / f"{name}{layout.suffix}"
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


def warn_timeless(plan: Plan, say: Callable[[str], None]) -> None:
    """Say it if the scene gets no STAC item."""
    if plan.time is None:
        say(
            "no STAC item, because no time is known: give --datetime=2020-08-31 or an "
            "interval, START/END"
        )


def job_of(layout: Any, encoder: Encoder, plan: Plan, source: str) -> str:
    """16 hexadecimal digits of what the vectors of a scene are computed from."""
    reader, grid = layout.reader, layout.reader.grid
    times = [t.isoformat() for t in (plan.time, plan.end) if t is not None]
    told = [
        SCHEMA, layout.unit, encoder.digest, facts_of(reader.raster),
        reader.reading.places, grid.size, grid.stride, grid.side, plan.pooling,
        plan.min_valid, plan.dtype, "/".join(times) or None, source,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
