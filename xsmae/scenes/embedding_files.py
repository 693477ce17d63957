"""The files of a map of embeddings: a Cloud-Optimized GeoTIFF and a picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsmae.data.raster_write import Layers, read_tags, write_categories, write_cog
from xsmae.errors import BadImageError, UserError, printable
from xsmae.figures.embedding_map import SIDE, View, ground_text
from xsmae.process.lock import FolderLock
from xsmae.scenes.embedded import CHIP, EmbeddedGrid
from xsmae.scenes.maps import TAG
from xsmae.scenes.thumbnails import read_scene

if TYPE_CHECKING:
    from jaxtyping import Shaped

SCHEMA = 1
FACTS = "FACTS"  # the tag of what was found, as JSON


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """The files of one map: the GeoTIFF, the picture, and what was found.

    facts: `components`: the part of the `variance` that each component has. `classes`:
    the `shares` of the classes in this scene. `difference`: the `mean` over the `cells`
    that both scenes have, and their `share` of the first scene's.
    """

    raster: Path
    picture: Path
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The content of a map.

    rows: the bands of the GeoTIFF, for `Layers`. options: others of `Layers`. draw:
    draws the picture. categories: names of the numbers.
    """

    rows: Shaped[Any, "height bands width"]
    bands: Sequence[str]
    resampling: str
    nodata: float
    facts: Mapping[str, Any]
    draw: Callable[[Path, View], None]
    title: str
    colours: Sequence[tuple[int, int, int]] = ()
    categories: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a map is written. ending: of the files' names."""

    folder: Path
    name: str
    ending: str
    job: str

    @property
    def raster(self) -> Path:
        """The GeoTIFF."""
        return self.folder / f"{self.name}_{self.ending}.tif"

    @property
    def picture(self) -> Path:
        """The PNG."""
        return self.raster.with_suffix(".png")

    @property
    def categories(self) -> Path:
        """The names of the classes, for GDAL."""
        return Path(f"{self.raster}.aux.xml")

    @property
    def unfinished(self) -> Path:
        """The folder of the files until all are there."""
        return self.folder / f".{self.raster.stem}.unfinished"

    def there(self, categories: bool) -> EmbeddingMap | None:
        """The map of this job if it is finished; UserError if another one is there."""
        if not self.raster.exists():
            return None
        try:
            tags = read_tags(self.raster)
            facts = json.loads(tags.get(FACTS, "null"))
        except (BadImageError, ValueError):
            tags, facts = {}, None
        if tags.get(TAG) != self.job or facts is None:
            raise UserError(
                f"{printable(str(self.raster))} is there, of other embeddings or "
                "options: give another --out, or remove it"
            )
        more = [self.categories] if categories else []
        if not all(path.exists() for path in (self.picture, *more)):
            return None
        return EmbeddingMap(self.raster, self.picture, facts)


def job_of(kind: str, grids: Sequence[EmbeddedGrid], **options: Any) -> str:
    """16 hexadecimal digits of what a map is computed from."""
    scenes = [[grid.name, grid.unit, grid.emb.get("job")] for grid in grids]
    told = [SCHEMA, kind, options, scenes, grids[0].emb["model"]["digest"]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def write_map(
    target: Target,
    grid: EmbeddedGrid,
    compute: Callable[[Path], Drawn],
    *,
    shown: Sequence[EmbeddedGrid],
    say: Callable[[str], None],
) -> EmbeddingMap:
    """Compute a map, write its files, then move all in place, the GeoTIFF last.

    grid: of the cells. compute: gets a folder for files that are not kept. shown: the
    scenes that are drawn beside the map. Raises UserError if a file cannot be written.
    """
    folder = target.unfinished
    try:
        with FolderLock(folder):
            try:
                return _write(target, grid, compute, shown, say)
            finally:
                shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(target.folder))}: "
            f"{error.strerror or error}; give another --out"
        ) from None


def _write(target, grid, compute, shown, say) -> EmbeddingMap:
    folder = target.unfinished
    drawn = compute(folder)
    layers = Layers(
        drawn.rows,
        drawn.bands,
        resampling=drawn.resampling,
        colours=drawn.colours,
        tags={TAG: target.job, FACTS: json.dumps(dict(drawn.facts))},
        nodata=drawn.nodata,
        transform=grid.cell_transform,
        crs=grid.crs,
    )
    made = {path: folder / path.name for path in (target.picture, target.raster)}
    write_cog(made[target.raster], layers, scratch=folder / "scratch.tif")
    if drawn.categories:
        made = {target.categories: folder / target.categories.name} | made
        write_categories(made[target.categories], drawn.categories)
    drawn.draw(made[target.picture], view_of(grid, drawn.title, shown, say))
    for path, temporary in made.items():
        temporary.replace(path)
    return EmbeddingMap(target.raster, target.picture, dict(drawn.facts))


def view_of(
    grid: EmbeddedGrid,
    title: str,
    shown: Sequence[EmbeddedGrid],
    say: Callable[[str], None],
) -> View:
    """What the map is drawn on; says it of each scene that cannot be read."""
    images = []
    for scene in shown:
        picture = read_scene(scene.source, scene.pixels, SIDE)
        if picture.image is None:
            say(printable(f"{scene.name} is not drawn: {picture.reason}"))
        else:
            images.append((scene.date or scene.name, picture.image))
    return View(
        title=title,
        images=images,
        pixels=grid.pixels,
        gsd=grid.gsd,
        extent=grid.extent,
        cell=grid.cell,
        unit=_unit(grid),
    )


def _unit(grid: EmbeddedGrid) -> str:
    if grid.unit != CHIP:
        return "patch"
    high, wide = grid.emb["emb:chip_layout"]["chip_size"]
    return f"chip of {ground_text((high * grid.gsd[0], wide * grid.gsd[1]))}"
