"""The windows of rasters: cells of whole blocks, with the part of them that is valid.

    index = WindowIndex.build("scenes", sensor="sentinel2_l2a", cache="scenes.json")
    window = index[0]
    values, valid = index.raster(window.scene).read(window.box, size=128)

A cell is about as large as asked, made of whole blocks, since GDAL decodes a block for
any pixel of it. Every raster is looked at once; what was found is kept in the cache.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xsmae.data import gdal
from xsmae.data.geotiff_cache import IndexCache, Row, made_of, made_of_header
from xsmae.data.geotiff_listing import Entry, list_rasters
from xsmae.data.geotiff_scene import Scene, look, scene_of
from xsmae.data.raster import Raster
from xsmae.data.raster_options import RasterOptions
from xsmae.data.records import fingerprint
from xsmae.errors import BadImageError, UserError
from xsmae.process.log import LOG

EVERY = 10.0  # seconds between two lines of progress, and two writings of the cache


@dataclasses.dataclass(frozen=True)
class Window:
    """scene: its number in the index. box: top, left, height, width in pixels. valid:
    the part of its pixels that is. gsd: metres per pixel along y and x."""

    scene: int
    box: tuple[int, int, int, int]
    valid: float
    gsd: tuple[float, float]


class WindowIndex:
    """The windows of all rasters in order, without those that are mostly invalid.

    Attributes:
      scenes: the rasters that can be used.
      rejected: id -> reason, of those that cannot.
      left_out: windows with fewer valid pixels than `min_valid`.
      unreadable: windows whose pixels cannot be read.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        rejected: dict[str, str],
        *,
        min_valid: float,
        how: RasterOptions,
        notes: Sequence[str] = (),
    ):
        self.scenes, self.rejected = tuple(scenes), dict(rejected)
        self.min_valid = min_valid
        self._how, self._notes = how, tuple(notes)
        self._rasters: dict[int, Raster] = {}
        self.left_out = self.unreadable = 0
        cells = []
        for number, scene in enumerate(self.scenes):
            broken = np.isnan(scene.valid)
            good = ~broken & (np.where(broken, 0, scene.valid) >= min_valid)
            self.unreadable += int(broken.sum())
            self.left_out += int((~broken & ~good).sum())
            where = np.argwhere(good)
            cells.append(np.column_stack([np.full(len(where), number), where]))
        self._cells = np.concatenate(cells) if cells else np.zeros((0, 3), int)

    @classmethod
    def build(
        cls,
        data: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        window: int = 512,
        min_valid: float = 0.5,
        cache: str | os.PathLike | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = LOG.info,
        **options: Any,
    ) -> WindowIndex:
        """Look at every raster once; a build that was stopped or killed resumes.

        Args:
          data: a folder, a list of rasters, one raster or VRT, or a table with the
            columns path, label, gsd, bands (`geotiff_listing`).
          window: pixels, about the side of a window.
          min_valid: windows with a smaller part of valid pixels are left out.
          cache: a file for what is found; None: nothing is kept.
          say: takes the lines of progress.
          options: the fields of `RasterOptions`, for all rasters.

        Raises:
          UserError: bad options, no raster that can be used, a GSD that is not known.
          KeyboardInterrupt: `should_stop()`; the cache has what was found.
        """
        if window < 1 or not 0 <= min_valid <= 1:
            raise UserError(
                f"window={window}, min_valid={min_valid}; expected a side above 0, and "
                "a part of 0 to 1"
            )
        how = RasterOptions(**options)
        entries, notes = list_rasters(data)
        kept = IndexCache(
            None if cache is None else Path(cache), {**how.plain(), "window": window}
        )
        rows = _rows(entries, kept, how, window, should_stop, say)
        scenes = [scene_of(e, r) for e, r in rows if "rejected" not in r]
        rejected = {e.id: r["rejected"] for e, r in rows if "rejected" in r}
        if not scenes:
            name, why = next(iter(rejected.items()))
            raise UserError(
                f"none of the {len(rejected)} rasters can be used, the first {name!r}: "
                f"{why}"
            )
        return cls(scenes, rejected, min_valid=min_valid, how=how, notes=notes)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Window:
        number, i, j = map(int, self._cells[index])
        scene = self.scenes[number]
        (top, bottom), (left, right) = scene.rows[i : i + 2], scene.columns[j : j + 2]
        gsd = scene.gsd if scene.gsds is None else scene.gsds[i, j]
        return Window(
            number,
            (int(top), int(left), int(bottom - top), int(right - left)),
            float(scene.valid[i, j]),
            (float(gsd[0]), float(gsd[1])),
        )

    def raster(self, scene: int) -> Raster:
        """The opened raster of a scene; raises BadImageError as `open_raster` does."""
        if scene not in self._rasters:
            entry = self.scenes[scene].entry
            self._rasters[scene] = self._how.open(entry)
        return self._rasters[scene]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the windows, wherever the files are stored."""
        scenes = (
            (s.entry.id, s.bands, s.dtype, s.crs, s.transform, s.shape, s.gsd, *s.notes)
            for s in self.scenes
        )
        windows = (self._cells.tobytes().hex(),)
        return fingerprint(("WindowIndex", self.min_valid), *scenes, windows)

    def notes(self) -> list[str]:
        """What a user should know before the windows are used, a line each."""
        notes = list(self._notes)
        if self.left_out:
            notes.append(
                f"{self.left_out} windows are left out: less than {self.min_valid:.0%} "
                "of their pixels are valid"
            )
        if self.unreadable:
            notes.append(f"{self.unreadable} windows are left out: they are damaged")
        if self.rejected:
            name, why = next(iter(self.rejected.items()))
            count = len(self.rejected)
            notes.append(f"{count} rasters cannot be used, the first {name!r}: {why}")
        said = collections.Counter(note for s in self.scenes for note in s.notes)
        total = len(self.scenes)
        return notes + [f"{n} of {total} rasters: {text}" for text, n in said.items()]

    def __repr__(self) -> str:
        # grain compares repr(source) on resume: no path, no address.
        return (
            f"WindowIndex({len(self)} windows of {len(self.scenes)} rasters, "
            f"fingerprint={self.fingerprint})"
        )


def _rows(
    entries: Sequence[Entry],
    cache: IndexCache,
    how: RasterOptions,
    window: int,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> list[tuple[Entry, Row]]:
    """The row of every raster, from the cache or looked at now."""
    rows, looked_at, last = [], 0, time.monotonic()
    try:
        for entry in entries:
            if should_stop():
                raise KeyboardInterrupt
            row, new = _row(entry, cache, how, window)
            rows.append((entry, row))
            looked_at += new
            now = time.monotonic()
            if now - last > EVERY:
                say(f"rasters: {len(rows)}/{len(entries)}")
                cache.save()
                last = time.monotonic()
    finally:
        if looked_at:
            cache.save()
    say(f"rasters: {len(rows)}/{len(entries)}, {looked_at} of them looked at now")
    return rows


def _row(
    entry: Entry, cache: IndexCache, how: RasterOptions, window: int
) -> tuple[Row, bool]:
    """The row of a raster, and True if it was looked at now."""
    local = gdal.is_file(entry.path)
    if local:
        row = cache.find(entry, made_of(entry, cache.files_of(entry)))
        if row is not None:
            return row, False
    try:
        with how.open(entry) as raster:
            files = [f for f in raster.files if f != raster.path and gdal.is_file(f)]
            if local:
                key = made_of(entry, tuple(files))
            else:
                key = made_of_header(entry, raster)
                row = cache.find(entry, key)
                if row is not None:
                    return row, False
            row = {"made_of": key, "files": files, **look(raster, window)}
    except BadImageError as error:
        row = {"made_of": made_of(entry, ()), "files": [], "rejected": str(error)}
        if not local:
            return row, True  # the network may be better the next time
    cache.put(entry, row)
    return row, True
