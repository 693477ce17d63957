"""Maps of embeddings beside their scene: components, classes, differences."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from xsmae.figures.style import LEGEND, metres, save, scale_bar

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from matplotlib.axes import Axes

SIDE = 1024  # cells or pixels that are drawn, along the longer side
PANEL = 5.9  # inches, the width of a panel
TALLEST = 12
COLUMNS = 4  # of the legend
LEAST = 0.01  # the end of the scale of differences, at least
NOTHING = "white"
CHANNELS = ("#e03030", "#30a030", "#3050e0")


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """What a map is drawn on.

    title: lines. images: scenes in colour, each with its title; none if they cannot be
    read. pixels: height and width of the scene. gsd: metres per pixel along y and x.
    extent: left, right, top and bottom of the cells in pixels. cell: metres of a cell
    along y and x. unit: what has a cell, in words.
    """

    title: str
    images: Sequence[tuple[str, UInt8[np.ndarray, "height width rgb"]]]
    pixels: tuple[int, int]
    gsd: tuple[float, float]
    extent: tuple[float, float, float, float]
    cell: tuple[float, float]
    unit: str


def draw_components(
    path: str | os.PathLike,
    view: View,
    colours: UInt8[np.ndarray, "rows columns rgb"],
    known: np.ndarray,
    variance: Sequence[float],
) -> None:
    """Draw three components as red, green and blue; white where not known."""
    words = ("red", "green", "blue")
    entries = [
        (f"{word}: {part:.0%} of the variance", colour)
        for word, part, colour in zip(words, variance, CHANNELS, strict=True)
    ]
    image = np.where(known[..., None], colours, np.uint8(255))
    _draw(path, view, "similar colours, similar vectors", image, known, entries)


def draw_classes(
    path: str | os.PathLike,
    view: View,
    classes: UInt8[np.ndarray, "rows columns"],
    known: np.ndarray,
    names: Sequence[str],
    colours: UInt8[np.ndarray, "classes rgb"],
) -> None:
    """Draw classes; the legend has the part of each among the cells that are known."""
    counts = np.bincount(classes[known], minlength=len(names))
    total = max(counts.sum(), 1)
    entries = [
        (f"{name}, {count / total:.1%}", colour / 255)
        for name, count, colour in zip(names, counts, colours, strict=True)
    ]
    places = np.where(known, classes, 0)
    image = np.where(known[..., None], colours[places], np.uint8(255))
    _draw(path, view, "classes", image, known, entries)


def draw_difference(
    path: str | os.PathLike, view: View, values: Float[np.ndarray, "rows columns"]
) -> None:
    """Draw 1 - cosine with a colour bar; its end is the 98th percentile, rounded up."""
    known = np.isfinite(values)
    end = _round_up(max(float(np.percentile(values[known], 98)), LEAST))
    masked = np.ma.masked_invalid(values)
    more = "max" if values[known].max() > end else "neither"
    name = "difference: 1 - cosine of the vectors"
    style = {"cmap": "viridis", "vmin": 0.0, "vmax": end}
    _draw(path, view, name, masked, known, [], style=style, extend=more)


def _draw(path, view, name, image, known, entries, **bar) -> None:
    height, width = view.pixels
    shape = height * view.gsd[0] / (width * view.gsd[1])
    if not known.all():
        part = 1 - known.mean()
        entries = [*entries, (f"no vector, {part:.1%} of all cells", NOTHING)]
    legend_rows = math.ceil(len(entries) / COLUMNS)
    panels = len(view.images) + 1
    tall = min(max(PANEL * shape, 1), TALLEST)
    wide = max(PANEL * panels, 1.4 * PANEL)
    size = (wide, tall + 1.2 + 0.25 * legend_rows + (1.2 if bar else 0))
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(1, panels, squeeze=False)[0]
    for ax, (text, picture) in zip(axes, view.images, strict=False):
        _show(ax, view, picture, (0, width, 0, height), text)
    ax = axes[-1]
    text = f"{name}\ncells of {ground_text(view.cell)}, one for each {view.unit}"
    drawn = _show(ax, view, image, view.extent, text, bar.get("style"))
    scale_bar(axes[0], width, view.gsd[1])
    axes[0].xaxis.labelpad = 4 + 0.035 * 72 * tall  # below the bar
    if bar:
        fig.colorbar(
            drawn,
            ax=list(axes),
            location="bottom",
            extend=bar["extend"],
            label="1 - cosine (0: the same direction)",
            shrink=0.6,
            aspect=40,
        )
    fig.suptitle(view.title, fontsize=11)
    patches = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=label)
        for label, colour in entries
    ]
    if patches:
        where = "outside lower center"
        fig.legend(handles=patches, loc=where, ncols=COLUMNS, **LEGEND)
    save(fig, path)


def _show(ax: Axes, view: View, image, extent, title: str, style=None):
    """Draw an image where it lies in the scene, at most `SIDE` of its pixels a side."""
    places = [
        ((np.arange(n) + 0.5) * side / n).astype(int)
        for side, n in ((side, min(side, SIDE)) for side in image.shape[:2])
    ]
    left, right, top, bottom = (x - 0.5 for x in extent)
    drawn = ax.imshow(
        image[np.ix_(*places)],
        extent=(left, right, bottom, top),
        interpolation="nearest",
        aspect=view.gsd[0] / view.gsd[1],
        **(style or {}),
    )
    height, width = view.pixels
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    ax.spines[:].set(linewidth=0.5, color="0.6")
    ax.set_title(title, fontsize=10)
    return drawn


def ground_text(size: tuple[float, float]) -> str:
    """Width and height on the ground, from metres along y and x."""
    return " × ".join(metres(float(f"{side:.3g}")) for side in size[::-1])


def _round_up(value: float) -> float:
    """To the next of 1, 2, 3, ... 9 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return math.ceil(round(value / power, 6)) * power
