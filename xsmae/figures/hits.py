"""A sheet of the chips that a search found, with scores and scale bars."""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from xsmae.figures.style import VIEW_COLOURS, save, scale_bar, show

if TYPE_CHECKING:
    from jaxtyping import UInt8

COLUMNS = 6
MOST = 60  # tiles; figures cannot be much taller
GREY = 0.85


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """A chip. image: None if it cannot be read, and `reason` says why.

    ground: metres along y and x. query: it was looked for, and gets a frame.
    """

    title: str
    image: UInt8[np.ndarray, "height width 3"] | None
    reason: str
    ground: tuple[float, float]
    query: bool = False


def hit_sheet(path: str | os.PathLike, tiles: Sequence[Tile], title: str) -> None:
    """Draw up to `MOST` tiles as a PNG, six per row."""
    if len(tiles) > MOST:
        title = f"{title}; the first {MOST} tiles of {len(tiles)}"
    tiles = tiles[:MOST]
    columns = min(COLUMNS, max(len(tiles), 2))
    rows = max(math.ceil(len(tiles) / columns), 1)
    fig = Figure(figsize=(2.5 * columns, 3.4 * rows + 0.4), layout="constrained")
    axes = np.ravel(fig.subplots(rows, columns, squeeze=False))
    for ax, tile in zip(axes, tiles, strict=False):
        _draw(ax, tile)
    for ax in axes[len(tiles) :]:
        ax.set_axis_off()
    fig.suptitle(title, fontsize=10)
    save(fig, path)


def _draw(ax, tile: Tile) -> None:
    image = tile.image
    if image is None:
        image = np.full((100, 100, 3), GREY)
        text = "\n".join(textwrap.wrap(tile.reason, 26)[:7])
        ax.text(49.5, 49.5, text, ha="center", va="center", fontsize=8)
    show(ax, image)
    height, width = image.shape[:2]
    ax.set_aspect(tile.ground[0] / height / (tile.ground[1] / width))
    scale_bar(ax, width, tile.ground[1] / width)
    if tile.query:
        ax.spines[:].set(visible=True, color=VIEW_COLOURS[1], linewidth=3)
    ax.set_title(tile.title, fontsize=8)
