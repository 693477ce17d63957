"""`xsmae.map_embeddings`: maps of embedded scenes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xsmae.data.raster_write import NODATA
from xsmae.errors import UserError, printable
from xsmae.figures.embedding_map import draw_classes, draw_components, draw_difference
from xsmae.figures.mask_sheet import class_colours
from xsmae.scenes.components import Components, fit_components
from xsmae.scenes.difference import Match, differences
from xsmae.scenes.embedded import WORDS, EmbeddedGrid, open_grids
from xsmae.scenes.embedding_files import (
    Drawn,
    EmbeddingMap,
    Target,
    job_of,
    write_map,
)
from xsmae.scenes.kmeans import fit_centres, nearest_centres
from xsmae.scenes.sample import Sample, all_vectors

# Kind -> the ending of its files. `xsmae predict` writes SCENE_classes.tif.
KINDS = {"components": "components", "classes": "kmeans", "difference": "difference"}
CLASSES, MOST = 8, 64


def map_embeddings(
    embeddings: str | os.PathLike,
    out: str | os.PathLike,
    *,
    kind: str = "components",
    scenes: Sequence[str] = (),
    classes: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[EmbeddingMap]:
    """Draw embedded scenes as GeoTIFFs and pictures; returns the files of each map.

        maps = xsmae.map_embeddings("embeddings", "maps")
        print(maps[0].raster, maps[0].picture, maps[0].facts["variance"])

    All vectors are of unit length, as in `search`. Memory does not grow with their
    number: it is that of some blocks, a sample, and the map. The same call writes the
    same maps, and a map that is there is not computed again.

    Args:
      embeddings: the folder that `xsmae embed SCENES` wrote, of chips or of patches.
      out: the folder to write to.
      kind: `components`: three principal components of all scenes as red, green and
        blue. `classes`: k-means over all scenes. `difference`: 1 - cosine of two
        scenes of the same ground, for each cell of the first.
      scenes: names of scenes, without a suffix; all if there are none, and two for
        `difference`.
      classes: how many, for `classes`; by default 8.
      say: called with a line for each map, and for what was decided.
      should_stop: asked between blocks; once true, KeyboardInterrupt is raised.

    Raises:
      UserError: the embeddings cannot be read or compared, a scene is not there, two
        scenes have no common ground, or the map of something else is in the way.
    """
    scenes = [scenes] if isinstance(scenes, str) else list(scenes)
    _check(kind, scenes, classes)
    grids = open_grids(embeddings, scenes)
    out = Path(out)
    if kind == "difference":
        return [_difference(grids, out, say, should_stop)]
    options = {"classes": classes or CLASSES} if kind == "classes" else {}
    job = job_of(kind, grids, **options)
    targets = [Target(out, grid.name, KINDS[kind], job) for grid in grids]
    there = [target.there(kind == "classes") for target in targets]
    write = None
    found = []
    for grid, target, old in zip(grids, targets, there, strict=True):
        if old is None and write is None:
            fit = _fit_classes if kind == "classes" else _fit_components
            write = fit(grids, say, should_stop, **options)
        new = old or write_map(
            target,
            grid,
            lambda _, grid=grid, write=write: write(grid),
            shown=[grid],
            say=say,
        )
        found.append(new)
        _say_files(new, old is not None, say)
    return found


def _check(kind: str, scenes: Sequence[str], classes: int | None) -> None:
    """Raise UserError for arguments that do not fit."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r}, expected one of {', '.join(KINDS)}")
    if classes is not None and kind != "classes":
        raise UserError(f"classes={classes} is for kind=classes, not {kind}: omit it")
    if classes is not None and not 2 <= classes <= MOST:
        raise UserError(f"classes={classes}, expected 2 to {MOST}")
    if kind == "difference" and len(scenes) != 2:
        raise UserError(
            f"{len(scenes)} scenes given, expected two for kind=difference: "
            "--scene=BEFORE --scene=AFTER"
        )
    if kind != "difference" and len(set(scenes)) != len(scenes):
        raise UserError(f"a scene is given twice in {', '.join(scenes)}: give it once")


def _say_files(found: EmbeddingMap, old: bool, say) -> None:
    said = ", which was there" if old else ""
    say(printable(f"{found.raster}{said}"))
    say(printable(f"{found.picture}{said}"))


def _counted(count: int, grids: Sequence[EmbeddedGrid]) -> str:
    scenes = f"{len(grids)} scenes" if len(grids) > 1 else grids[0].name
    return f"{count} {WORDS[grids[0].unit]} of {scenes}"


def _title(grid: EmbeddedGrid) -> str:
    return f"{grid.name}, {grid.date}" if grid.date else grid.name


def _fit_components(grids, say, should_stop):
    """What maps a scene, fitted to all."""
    found = fit_components(all_vectors(grids, should_stop))
    parts = ", ".join(f"{part:.1%}" for part in found.variance)
    said = _counted(found.count, grids)
    say(printable(f"components: {parts} of the variance of {said}"))

    def write(grid: EmbeddedGrid) -> Drawn:
        image = _cells(grid, found.colours, (3,), np.uint8, 0, should_stop)
        known = image.any(axis=-1)
        variance = found.variance.tolist()
        return Drawn(
            rows=image.transpose(0, 2, 1),
            bands=[f"component {i + 1}" for i in range(3)],
            resampling="AVERAGE",
            nodata=0,
            facts={"variance": variance, **_limits(found)},
            draw=lambda path, view: draw_components(path, view, image, known, variance),
            title=f"{_title(grid)}: three principal components of {said}",
        )

    return write


def _limits(found: Components) -> dict[str, list[float]]:
    return {"low": found.low.tolist(), "high": found.high.tolist()}


def _fit_classes(grids, say, should_stop, *, classes: int):
    """What maps a scene, fitted to a sample of all."""
    sample = Sample(grids[0].emb["emb:dimensions"])
    for vectors in all_vectors(grids, should_stop):
        sample.add(vectors)
    centres = fit_centres(sample.vectors, classes)
    said = f"{classes} classes of {_counted(sample.count, grids)}"
    of = f", from {len(sample.vectors)} of them" * (len(sample.vectors) < sample.count)
    say(printable(f"k-means: {said}{of}"))
    names = [f"class {i + 1}" for i in range(classes)]
    colours = class_colours((), classes)[:-1]

    def write(grid: EmbeddedGrid) -> Drawn:
        def numbers(vectors):
            return nearest_centres(vectors, centres).astype(np.uint8)

        found = _cells(grid, numbers, (), np.uint8, NODATA, should_stop)
        known = found != NODATA
        counts = np.bincount(found[known], minlength=classes)
        return Drawn(
            rows=found[:, None],
            bands=["class"],
            resampling="MODE",
            nodata=NODATA,
            facts={"shares": (counts / counts.sum()).tolist()},
            draw=lambda path, view: draw_classes(
                path, view, found, known, names, colours
            ),
            title=f"{_title(grid)}: {said}, by k-means",
            colours=[tuple(colour) for colour in colours],
            categories=names,
        )

    return write


def _cells(grid, convert, more, dtype, nodata, should_stop) -> np.ndarray:
    """What `convert` makes of the vector of each cell, `nodata` where there is none."""
    found = np.full((*grid.shape, *more), nodata, dtype)
    for block in grid.blocks():
        if should_stop():
            raise KeyboardInterrupt
        found[block.rows, block.columns] = convert(block.vectors)
    return found


def _difference(grids, out, say, should_stop) -> EmbeddingMap:
    first, second = grids
    match = Match.of(first, second)
    job = job_of("difference", grids)
    target = Target(out, f"{first.name}_to_{second.name}", KINDS["difference"], job)
    if not match.same:
        say(
            printable(
                f"the grids differ: each cell of {first.name} is compared with the "
                f"nearest one of {second.name}"
            )
        )
    old = target.there(False)
    new = old or write_map(
        target,
        first,
        lambda folder: _compared(match, folder / "vectors.raw", should_stop),
        shown=[first, second] if match.same else [first],
        say=say,
    )
    facts = new.facts
    say(
        f"mean difference {facts['mean']:.4f} in {facts['cells']} cells, "
        f"{facts['share']:.1%} of those of the first scene"
    )
    _say_files(new, old is not None, say)
    return new


def _compared(match: Match, scratch: Path, should_stop) -> Drawn:
    first, second = match.first, match.second
    values = differences(match, scratch, should_stop)
    known = np.isfinite(values)
    if not known.any():
        raise UserError(
            f"{printable(first.name)} and {printable(second.name)} have no vectors of "
            "the same ground: give two scenes of the same place"
        )
    cells = int(known.sum())
    own = sum(len(block.rows) for block in first.blocks())
    mean = float(values[known].mean(dtype=np.float64))
    return Drawn(
        rows=values[:, None],
        bands=["1 - cosine"],
        resampling="AVERAGE",
        nodata=np.nan,
        facts={"mean": mean, "cells": cells, "share": cells / own},
        draw=lambda path, view: draw_difference(path, view, values),
        title=f"{_title(first)} and {_title(second)}: mean difference {mean:.3f} in "
        f"{cells} cells",
    )
