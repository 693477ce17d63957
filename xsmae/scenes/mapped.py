"""`xsmae.map_scene`: the map of one scene, a file or an open raster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from xsmae.data.raster import Raster, open_raster
from xsmae.errors import UserError
from xsmae.process.log import LOG, shown
from xsmae.scenes import maps
from xsmae.weights.head import Head, load_head


def map_scene(
    head: Head | str | os.PathLike,
    scene: Raster | str | os.PathLike,
    out: str | os.PathLike,
    *,
    name: str | None = None,
    probabilities: bool = False,
    batch_size: int = 8,
    missing_bands: str = "refuse",
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> maps.Outputs:
    """Map a scene of any size with a segmentation head; returns the written files.

        outputs = xsmae.map_scene("runs/land", "scenes/a.tif", "maps")
        print(outputs.classes, outputs.overlay)

    A map that was stopped is resumed. A finished one is not computed again.

    Args:
      head: from `load_head`, or its folder.
      scene: from `open_raster`, which can name bands, units and the GSD, or its file.
      out: the folder to write to. name: the files begin with it; None: the scene's
        name.
      probabilities: also write a GeoTIFF with a band for each class.
      batch_size: windows per call of the head.
      missing_bands: what to do if the head reads bands that the scene lacks: `mean`
        fills them with their mean, `refuse` raises.
      progress: log what was decided about the scene, and the rows that are done.
      should_stop: called after each strip; once true, KeyboardInterrupt is raised.

    Raises:
      UserError: the head cannot read the scene, a file cannot be written, or the map
        of another head or scene is there.
      BadImageError: a part of the scene cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}, expected 1 or more")
    head = head if isinstance(head, Head) else load_head(head)
    own = not isinstance(scene, Raster)
    opened = open_raster(scene) if own else contextlib.nullcontext(scene)
    say = LOG.info if progress else lambda line: None
    with shown(), opened as raster:
        outputs = maps.Outputs(Path(out), name or Path(raster.path).stem)
        for note in raster.notes():
            say(f"{outputs.name}: {note}")
        maps.map_scene(
            head,
            raster,
            outputs,
            probabilities=probabilities,
            batch_size=batch_size,
            missing_bands=missing_bands,
            say=lambda line: say(f"{outputs.name}: {line}"),
            should_stop=should_stop,
        )
    return outputs
