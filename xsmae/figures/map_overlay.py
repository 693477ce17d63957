"""A map of classes over its scene, with a legend and a scale bar."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from xsmae.bands import Bands
from xsmae.data.mask_classes import IGNORE
from xsmae.data.raster import Raster
from xsmae.figures.style import LEGEND, in_colour, save, scale_bar, show

if TYPE_CHECKING:
    from jaxtyping import UInt8

SIDE = 1024  # pixels, the longer side of the picture
OPACITY = 0.5  # of the classes
_ROWS = 256  # whose pixels are counted at a time


def map_overlay(
    path: str | os.PathLike,
    raster: Raster,
    as_read: Callable[[np.ndarray, np.ndarray], np.ndarray],
    classes: UInt8[np.ndarray, "height width"],
    *,
    bands: Bands,
    used: Sequence[str],
    names: Sequence[str],
    colours: UInt8[np.ndarray, "classes rgb"],
    title: str,
) -> None:
    """Draw a scene beside itself under the colours of its classes, as a PNG.

    as_read: from values and validity of the bands `used` to those of `bands`. colours:
    one more than names, for pixels without a value. The legend has the part of each
    class among the pixels that have a value.
    """
    ground = np.array(raster.shape) * raster.known_gsd()
    long = min(SIDE, max(raster.shape))
    size = np.maximum(1, np.round(long * ground / ground.max())).astype(int)
    values, valid = raster.read((0, 0, *raster.shape), tuple(map(int, size)), used)
    image = in_colour(as_read(values, valid), bands)
    image = np.where(valid[..., None], image, 1.0)
    places = [
        ((np.arange(n) + 0.5) * side / n).astype(int)
        for n, side in zip(size, raster.shape, strict=True)
    ]
    small = classes[np.ix_(*places)]
    known = small != IGNORE
    tint = colours[np.where(known, small, len(names))] / 255
    mixed = np.where(known[..., None], OPACITY * tint + (1 - OPACITY) * image, tint)
    counts = sum(
        np.bincount(classes[top : top + _ROWS].ravel(), minlength=IGNORE + 1)
        for top in range(0, len(classes), _ROWS)
    )
    _draw(path, image, mixed, counts, ground[1] / size[1], names, colours, title)


def _draw(path, image, mixed, counts, gsd, names, colours, title):
    height, width = image.shape[:2]
    columns = 4
    legend_rows = math.ceil((len(names) + 1) / columns)
    tall = min(max(5.9 * height / width, 1), 12)
    fig = Figure(figsize=(12, tall + 0.9 + 0.25 * legend_rows), layout="constrained")
    left, right = fig.subplots(1, 2)
    show(left, image)
    show(right, mixed)
    scale_bar(left, width, gsd)
    left.xaxis.labelpad = 4 + 0.035 * 72 * tall  # below the bar, however tall axes are
    fig.suptitle(title, fontsize=11)
    total = max(counts[:IGNORE].sum(), 1)
    labels = [
        f"{name}, {count / total:.1%}"
        for name, count in zip(names, counts, strict=False)
    ]
    if counts[IGNORE]:
        labels.append(f"no value, {counts[IGNORE] / counts.sum():.1%} of all")
    patches = [
        Patch(facecolor=colour / 255, edgecolor="black", linewidth=0.5, label=label)
        for colour, label in zip(colours, labels, strict=False)
    ]
    fig.legend(handles=patches, loc="outside lower center", ncols=columns, **LEGEND)
    save(fig, path)
