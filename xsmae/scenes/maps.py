"""Maps of whole scenes: the class of every pixel, as a GeoTIFF and as a picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.raster import Raster
from xsmae.data.raster_write import (
    NODATA,
    Layers,
    read_tags,
    write_categories,
    write_cog,
)
from xsmae.errors import UserError, printable
from xsmae.evaluation.reading import Reading
from xsmae.evaluation.segmentation.windows import Readable, segment
from xsmae.figures.map_overlay import map_overlay
from xsmae.figures.mask_sheet import class_colours
from xsmae.process.lock import FolderLock
from xsmae.scenes.inputs import facts_of, reading_of, used_bands, varying_gsd
from xsmae.scenes.strips import Strips
from xsmae.weights.encoder import outside_training
from xsmae.weights.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float

SCHEMA = 1
TAG = "XSMAE_JOB"
CERTAIN = 254  # the number of probability 1
ROWS = 64  # that are turned into numbers at a time
EVERY = 5.0  # seconds between progress lines


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files of one scene in a folder."""

    folder: Path
    name: str

    @property
    def classes(self) -> Path:
        """The GeoTIFF of classes."""
        return self.folder / f"{self.name}_classes.tif"

    @property
    def probabilities(self) -> Path:
        """The GeoTIFF of probabilities, if there is one."""
        return self.folder / f"{self.name}_probabilities.tif"

    @property
    def overlay(self) -> Path:
        """The picture."""
        return self.folder / f"{self.name}_overlay.png"

    @property
    def categories(self) -> Path:
        """The names of the classes, for GDAL."""
        return self.folder / f"{self.name}_classes.tif.aux.xml"

    @property
    def unfinished(self) -> Path:
        """The folder of the rows that are finished, until all are."""
        return self.folder / f".{self.name}.unfinished"

    def wanted(self, probabilities: bool) -> list[Path]:
        """The files that a finished scene has, the last one last."""
        more = [self.probabilities] if probabilities else []
        return [*more, self.overlay, self.categories, self.classes]


def map_scene(
    head: Head,
    raster: Raster,
    outputs: Outputs,
    *,
    probabilities: bool = False,
    batch_size: int = 8,
    missing_bands: str = "refuse",
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write the map of a scene; False if it was there already.

    A map of the same head and scene that was not finished is resumed, and ends with the
    same bytes. Memory is that of a strip of `head.crop` rows. missing_bands: one of
    `MISSING_BANDS`.

    Raises:
      UserError: the head cannot read the raster, a file cannot be written, or the map
        of another head or scene is there.
      BadImageError: a part of the raster cannot be read.
      KeyboardInterrupt: after a strip, once `should_stop()` is true.
    """
    reading = reading_of("the head", head.encoder.bands, raster, missing_bands)
    gsd = raster.known_gsd()
    if outside_training(head.encoder.info, min(gsd), max(gsd)):
        low, high = head.encoder.info["gsd_range"]
        say(
            f"the encoder was pretrained at {low:g} to {high:g} m per pixel, the scene "
            f"has {gsd[0]:g} x {gsd[1]:g} m: the map may be poor"
        )
    job = _digest(head, raster, reading)
    if _is_finished(outputs, job, probabilities):
        return False
    try:
        with FolderLock(outputs.unfinished):
            strips = _open_strips(head, raster, outputs, job, probabilities)
            if strips.next_row:
                say(f"resumes at row {strips.next_row} of {raster.shape[0]}")
            _compute(head, raster, reading, strips, batch_size, say, should_stop)
            _finish(head, raster, reading, strips, outputs, probabilities)
            shutil.rmtree(outputs.unfinished)
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(outputs.folder))}: "
            f"{error.strerror or error}; the same command resumes"
        ) from None
    return True


def _open_strips(head, raster, outputs, job, probabilities) -> Strips:
    shapes = {"classes": (1, raster.shape[1])}
    if probabilities:
        shapes["probabilities"] = (len(head.classes), raster.shape[1])
    return Strips(outputs.unfinished, job, shapes)


def _compute(
    head: Head,
    raster: Raster,
    reading: Reading,
    strips: Strips,
    batch_size: int,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """Compute the rows that are missing."""
    height, width = raster.shape

    def read(*window):
        values, valid = raster.read(window, bands=used_bands(raster, reading))
        return _filled(reading, raster, values, valid)

    def predict(images, gsd):
        # One shape for any number of windows, so that nothing is compiled again.
        count = len(images)
        missing = (0, batch_size - count)
        images = np.pad(images, [missing, *[(0, 0)] * 3], "edge")
        gsd = np.pad(gsd, [missing, (0, 0)], "edge")
        return np.asarray(head.predict(images, gsd=gsd))[:count]

    if strips.next_row == height:
        return
    scene = Readable(
        height, width, raster.known_gsd(), read, _gsd_at(raster), strips.next_row
    )
    options = {"crop": head.crop, "overlap": head.overlap, "batch_size": batch_size}
    begin = last = time.monotonic()
    start = strips.next_row
    for strip in segment([scene], predict, **options):
        for rows in _numbers(strip, raster, reading):
            strips.add({name: rows[name] for name in strips.shapes})
        strips.commit(strip.top + len(strip.scores))
        now, done = time.monotonic(), strips.next_row
        if now - last > EVERY and done < height:
            last = now
            left = round((now - begin) / (done - start) * (height - done))
            say(
                f"row {done} of {height}, {left // 3600}:{left // 60 % 60:02}:"
                f"{left % 60:02} left"
            )
        if should_stop() and done < height:
            raise KeyboardInterrupt


def _filled(
    reading: Reading, raster: Raster, values: np.ndarray, valid: np.ndarray
) -> Float[np.ndarray, "height width bands"]:
    """Values of the used bands as the encoder takes them; the mean where not valid."""
    whole = np.full((*valid.shape, len(raster.bands)), np.nan, np.float32)
    places = [raster.bands.index(name) for name in used_bands(raster, reading)]
    whole[..., places] = np.where(valid[..., None], values, np.nan)
    return reading(whole[None])[0]


def _numbers(strip, raster, reading) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a strip as 8-bit numbers [rows, bands, width], a few at a time."""
    width = raster.shape[1]
    for top in range(0, len(strip.scores), ROWS):
        scores = strip.scores[top : top + ROWS]
        if not np.isfinite(scores).all():
            raise UserError(
                f"the head gives scores that are not finite in the rows from "
                f"{strip.top + top} on: give another head"
            )
        window = (strip.top + top, 0, len(scores), width)
        _, valid = raster.read(window, bands=used_bands(raster, reading))
        classes = np.where(valid, scores.argmax(axis=-1), NODATA)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        shares = np.where(valid[..., None], np.rint(CERTAIN * shares), NODATA)
        yield {
            "classes": classes[:, None].astype(np.uint8),
            "probabilities": shares.transpose(0, 2, 1).astype(np.uint8),
        }


def _gsd_at(raster: Raster) -> Callable[..., tuple[float, float]] | None:
    """The GSD of a window; None if it is the same everywhere, or only given."""
    varying = varying_gsd(raster)
    if varying is None:
        return None
    return lambda top, left, height, width: tuple(
        varying(top + height / 2, left + width / 2)
    )


def _digest(head: Head, raster: Raster, reading: Reading) -> str:
    """16 hexadecimal digits of what a map is computed from."""
    told = [SCHEMA, head.digest, facts_of(raster), reading.places]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _is_finished(outputs: Outputs, job: str, probabilities: bool) -> bool:
    """True if all files are there; UserError if they are those of another job."""
    if not outputs.classes.exists():
        return False
    if read_tags(outputs.classes).get(TAG) != job:
        raise UserError(
            f"{printable(str(outputs.classes))} is the map of another head or scene: "
            "give another --out, or remove it"
        )
    return all(path.exists() for path in outputs.wanted(probabilities))


def _finish(
    head: Head,
    raster: Raster,
    reading: Reading,
    strips: Strips,
    outputs: Outputs,
    probabilities: bool,
) -> None:
    """Write the files from the finished rows, then move all in place."""
    folder = outputs.unfinished
    colours = class_colours(head.colours, len(head.classes))
    tags = {
        TAG: strips.job, "HEAD": head.digest,
        **{f"CLASS_{i}": name for i, name in enumerate(head.classes)},
    }  # fmt: skip
    made = {path: folder / path.name for path in outputs.wanted(probabilities)}
    layers = Layers(
        strips.rows("classes"),
        ["class"],
        resampling="MODE",
        colours=[tuple(colour) for colour in colours[:-1]],
        tags=tags,
    )
    scratch = folder / "scratch.tif"
    write_cog(made[outputs.classes], layers, like=raster, scratch=scratch)
    write_categories(made[outputs.categories], head.classes)
    if probabilities:
        layers = Layers(
            strips.rows("probabilities"),
            head.classes,
            resampling="AVERAGE",
            tags=tags,
            scale=1 / CERTAIN,
        )
        write_cog(made[outputs.probabilities], layers, like=raster, scratch=scratch)
    map_overlay(
        made[outputs.overlay],
        raster,
        lambda values, valid: _filled(reading, raster, values, valid),
        strips.rows("classes")[:, 0],
        bands=head.encoder.bands,
        used=used_bands(raster, reading),
        names=head.classes,
        colours=colours,
        title=outputs.name,
    )
    for path, temporary in made.items():
        temporary.replace(path)
