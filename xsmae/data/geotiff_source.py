"""The source that reads windows of rasters: whole scenes, or small files whole."""

from __future__ import annotations

import contextlib
import operator
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from xsmae.bands import UNITS
from xsmae.data import gdal
from xsmae.data.geotiff import Window, WindowIndex
from xsmae.data.geotiff_scene import Scene, shared_reads
from xsmae.data.raster import Raster
from xsmae.data.raster_views import DTYPE, RasterImage
from xsmae.data.records import OpenedSource, Record, fingerprint, number
from xsmae.data.sensors import wavelengths_of
from xsmae.data.splits import split_indices
from xsmae.errors import UserError
from xsmae.process.signals import stop_asked

LABELS = ("none", "table", "folder")
WINDOW = 256
CROPS_PER_READ = 8


class GeotiffSource(OpenedSource):
    """Windows of all rasters of a folder, a list, one file or a table, in float32.

    A raster that is no larger than a window is one record. The id is the raster's path
    and, if it has several windows, `@top,left` in pixels. Splits are made of rasters,
    not of windows, so that no scene is in two parts.

    Args:
      root: a folder of rasters, a table `path,label,gsd,bands`, or one raster or VRT.
      window: pixels, about the side of a window, which consists of whole blocks.
      min_valid: windows with a smaller part of valid pixels are left out.
      bands: names of bands to read, in this order; None: those of the rasters.
      sensor: a preset of `sensors.SENSORS`: band names, scale, offset and nodata.
      scale, offset, gsd, nodata_rule: see `raster.open_raster`.
      labels: "none"; "table": its column `label`; "folder": the first-level folder.
      split, test_fraction: see `splits`; of rasters.
      cache: a file that keeps what was found of the rasters; None: look at them again.
      crops_per_read: the most windows of the same blocks that are read together and
        follow each other in training. More are fewer reads, but windows of a batch are
        neighbours more often; with 1 none are.

    Raises:
      UserError: bad options, no raster that can be used, rasters of other bands, an
        unknown GSD, a raster without a label.
    """

    dtype = DTYPE

    def __init__(
        self,
        root: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        window: int = WINDOW,
        min_valid: float = 0.5,
        bands: Sequence[str] | None = None,
        sensor: str | None = None,
        scale: float | Sequence[float] | None = None,
        offset: float | Sequence[float] | None = None,
        gsd: float | tuple[float, float] | None = None,
        nodata_rule: str = "all",
        labels: str = "none",
        split: str = "all",
        test_fraction: float = 0.1,
        cache: str | os.PathLike | None = None,
        crops_per_read: int = CROPS_PER_READ,
    ):
        if labels not in LABELS:
            raise UserError(f"labels={labels!r}, expected one of {', '.join(LABELS)}")
        if crops_per_read < 1:
            raise UserError(f"crops_per_read={crops_per_read}, expected 1 or more")
        self._index = WindowIndex.build(
            root,
            window=window,
            min_valid=min_valid,
            bands=bands,
            scale=scale,
            offset=offset,
            gsd=gsd,
            nodata_rule=nodata_rule,
            sensor=sensor,
            cache=cache,
            should_stop=stop_asked,
        )
        scenes = self._index.scenes
        self._bands = _same_bands(scenes)
        names = [scene.entry.id for scene in scenes]
        by_scene, self._class_names = _labels(scenes, labels)
        chosen = split_indices(names, by_scene, split, test_fraction)
        windows = [self._index[i] for i in range(len(self._index))]
        inside = set(chosen.tolist())
        self._places = [i for i, w in enumerate(windows) if w.scene in inside]
        if not self._places:
            raise UserError(
                f"no window of {self._index!r} is in split={split!r} and has "
                f"{min_valid:.0%} valid pixels; lower min_valid or add rasters"
            )
        several = np.bincount([w.scene for w in windows], minlength=len(scenes)) > 1
        self._ids, self._scenes = [], []
        for place in self._places:
            scene, (top, left, _, _) = windows[place].scene, windows[place].box
            suffix = f"@{top},{left}" if several[scene] else ""
            self._ids.append(names[scene] + suffix)
            self._scenes.append(scene)
        self._labels = None if by_scene is None else by_scene[self._scenes]
        self._groups, self._together = _groups(
            [windows[place] for place in self._places], scenes, crops_per_read
        )
        raster = self._index.raster(self._scenes[0])
        self._units = units_of(raster)
        self.wavelengths = wavelengths_of(sensor, self._bands)
        self._fingerprint = fingerprint(
            (type(self).__name__, self._index.fingerprint, labels, self._units),
            self._class_names,
            *zip(
                self._ids,
                [None] * len(self) if by_scene is None else self._labels,
                strict=True,
            ),
        )

    @property
    def bands(self) -> tuple[str, ...]:
        """The names of the bands, in order."""
        return self._bands

    @property
    def units(self) -> str:
        """What the values are."""
        return self._units

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)]; None without labels."""
        return self._labels

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [len(self)], windows that share blocks; None if none do."""
        return self._groups

    @property
    def index(self) -> WindowIndex:
        """All rasters and windows, those of other splits too."""
        return self._index

    def window(self, index: int) -> Window:
        """The raster and the box of a record."""
        return self._index[self._places[index]]

    def notes(self) -> list[str]:
        """What was decided about the rasters, and what is left out."""
        return self._index.notes()

    def id(self, index: int) -> str:
        """The raster's path, and the window's corner if it has several."""
        return self._ids[index]

    def path(self, index: int) -> pathlib.Path | None:
        """The raster's file on this machine; None for one elsewhere."""
        path = self._index.scenes[self._scenes[index]].entry.path
        return pathlib.Path(path) if gdal.is_file(path) else None

    def __len__(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """A context with the record, its window not read yet; see `records.Source`."""
        index = operator.index(index)
        window = self.window(index)
        group = ()
        if self._groups is not None:
            together = self._together[self._groups[index]]
            group = tuple(self.window(i).box for i in together)
        image = RasterImage(self._index.raster(window.scene), window.box, group)
        label = None if self._labels is None else int(self._labels[index])
        yield Record(image, window.gsd, label, self.id(index))

    def __repr__(self) -> str:
        # grain compares repr(source) on resume, so it must not contain a path.
        return (
            f"{type(self).__name__}({len(self)} windows of {len(set(self._scenes))} "
            f"rasters, fingerprint={self.fingerprint})"
        )


def _groups(
    windows: Sequence[Window], scenes: Sequence[Scene], most: int
) -> tuple[np.ndarray | None, list[list[int]]]:
    """The group of each window, and the windows of each group; None if all are alone.

    most: windows in a group.
    """
    of_scene: dict[int, list[int]] = {}
    for place, window in enumerate(windows):
        of_scene.setdefault(window.scene, []).append(place)
    together = []
    for scene, places in of_scene.items():
        boxes = [windows[place].box for place in places]
        for part in shared_reads(boxes, scenes[scene].block, most):
            together.append([places[i] for i in part])
    if len(together) == len(windows):
        return None, []
    groups = np.empty(len(windows), int)
    for group, places in enumerate(together):
        groups[places] = group
    return groups, together


def _same_bands(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """The bands of all scenes; UserError if they differ."""
    first = scenes[0]
    for scene in scenes:
        if scene.bands != first.bands:
            common = [b for b in first.bands if all(b in s.bands for s in scenes)]
            raise UserError(
                f"{scene.entry.id} has the bands {', '.join(scene.bands)}, but "
                f"{first.entry.id} has {', '.join(first.bands)}; choose bands that all "
                "rasters have with --config.data.bands"
                + (f'="{tuple(common)!r}"' if common else "")
            )
    return first.bands


def _labels(
    scenes: Sequence[Scene], labels: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The class of every scene, and the names of the classes."""
    if labels == "none":
        return None, ()
    if labels == "table":
        found = [scene.entry.label for scene in scenes]
        hint = "fill its column label in, or set labels to none"
    else:
        parts = [scene.entry.id.rpartition("/")[0].split("/")[0] for scene in scenes]
        found = [part or None for part in parts]
        hint = "expected all rasters in a folder for each class"
    for scene, label in zip(scenes, found, strict=True):
        if label is None:
            raise UserError(f"{scene.entry.id} has no label (labels={labels}): {hint}")
    return number(found)


def units_of(raster: Raster) -> str:
    """What the values of a raster are, in words."""
    if raster.sensor is not None and _by_sensor(raster):
        return raster.sensor.units
    if raster.dtype == "uint8":
        return UNITS
    if set(raster.scale) == {1.0} and set(raster.offset) == {0.0}:
        return f"{raster.dtype} numbers as stored"
    pairs = sorted(set(zip(raster.scale, raster.offset, strict=True)))
    text = "; ".join(f"* {scale:g} + {offset:g}" for scale, offset in pairs)
    return f"{raster.dtype} numbers {text}"


def _by_sensor(raster: Raster) -> bool:
    """False if the user gave other scales and offsets than the sensor has."""
    sensor, given = raster.sensor, [*raster.scale, *raster.offset]
    places = [sensor.bands.index(band) for band in raster.bands]
    own = [x[place] for x in (sensor.scale, sensor.offset) for place in places]
    as_stored = raster.dtype.startswith("float") and set(raster.scale) == {1.0}
    return as_stored or np.allclose(given, own, rtol=1e-5, atol=1e-12)
