"""A map of the footprints of rasters, with the windows that are used."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

from xsmae.data.footprints import HELD_OUT, LEFT_OUT, USED, Footprint
from xsmae.figures.style import (
    LEGEND,
    NEUTRAL,
    VIEW_COLOURS,
    end_of,
    metres,
    round_length,
    save,
)

PLACES = 6  # most places that are drawn at a scale of their own
MOST = 2000  # rasters; of more the places are not looked for
SHOWN = 6  # names of rasters without a place
DEGREE = 111_195.0  # metres, of a great circle
FLAT = 20.0  # degrees of latitude; a map of more has no scale
SMALL = 0.015  # of the map's width: smaller footprints get a mark
KINDS = {
    USED: ("windows that are trained on", VIEW_COLOURS[0]),
    HELD_OUT: ("windows of another split", VIEW_COLOURS[1]),
    LEFT_OUT: ("windows that are left out", "#cccccc"),
}

Box = tuple[float, float, float, float]  # west, south, east, north


def footprints_map(
    path: str | os.PathLike,
    footprints: Sequence[Footprint],
    missing: Mapping[str, str],
) -> None:
    """Draw the footprints as a PNG: one map, and one of each place if they are apart.

    missing: name -> reason of the rasters that have no place.
    """
    places = find_places(footprints)
    inner = places[:PLACES] if len(places) > 1 else []
    rows = math.ceil(len(inner) / 3)
    fig = Figure(figsize=(10, 5.8 + 3 * rows), layout="constrained")
    grid = fig.add_gridspec(1 + rows, 3, height_ratios=[5.2] + [2.8] * rows)
    ax = fig.add_subplot(grid[0, :])
    total = len(footprints) + len(missing)
    _draw(ax, footprints, wide=True)
    ax.set_title(f"{len(footprints)} of {total} rasters, WGS 84", fontsize=10)
    for letter, place in zip("ABCDEF", inner, strict=False):
        west, _, east, north = _around(place)
        ax.annotate(
            letter,
            ((west + east) / 2, north),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
        )
    for i, place in enumerate(inner):
        small = fig.add_subplot(grid[1 + i // 3, i % 3])
        _draw(small, place, wide=False)
        what = end_of(place[0].name, 30) if len(place) == 1 else f"{len(place)} rasters"
        small.set_title(f"{'ABCDEF'[i]}: {what}", fontsize=9)
    used = {kind for footprint in footprints for _, kind in footprint.windows}
    handles = [
        Patch(facecolor=colour, edgecolor="black", label=text, alpha=0.8)
        for kind, (text, colour) in KINDS.items()
        if kind in used
    ]
    if handles:
        fig.legend(handles=handles, loc="outside lower center", ncols=3, **LEGEND)
    notes = _notes(footprints, places, missing)
    if notes:
        fig.suptitle("\n".join(notes), fontsize=8, color=NEUTRAL)
    save(fig, path)


def find_places(footprints: Sequence[Footprint]) -> list[list[Footprint]]:
    """Footprints that lie together, the most numerous first: at most their size apart.

    Of very many rasters it is one place.
    """
    if len(footprints) > MOST:
        return [list(footprints)]
    boxes = np.array([footprint.box for footprint in footprints])
    sizes = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])[:, None]
    low, high = boxes[:, :2] - sizes, boxes[:, 2:] + sizes
    left, places = set(range(len(footprints))), []
    while left:
        place, new = [], [left.pop()]
        while new:
            one = new.pop()
            place.append(one)
            near = (low <= high[one]).all(axis=1) & (high >= low[one]).all(axis=1)
            found = [i for i in np.flatnonzero(near).tolist() if i in left]
            left.difference_update(found)
            new += found
        places.append(sorted(place))
    places.sort(key=lambda place: (-len(place), place))
    return [[footprints[i] for i in place] for place in places]


def _around(footprints: Sequence[Footprint]) -> Box:
    boxes = np.array([footprint.box for footprint in footprints])
    return (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())


def _draw(ax: Axes, footprints: Sequence[Footprint], *, wide: bool) -> None:
    """The footprints with a graticule and a scale; wide: the axes have more room."""
    west, south, east, north = _around(footprints)
    middle = (south + north) / 2
    shrink = max(math.cos(math.radians(middle)), 0.05)  # of a degree of longitude
    height = max((north - south) * 1.2, 1e-6)
    width = max((east - west) * 1.2, 0.9 * height / shrink)
    height = max(height, width * shrink / (1.8 if wide else 1.2))
    centre = (west + east) / 2
    ax.set_xlim(centre - width / 2, centre + width / 2)
    # The scale has room of its own below.
    ax.set_ylim(middle - 0.65 * height, middle + height / 2)
    ax.set_aspect(1 / shrink)
    ax.grid(alpha=0.3, linewidth=0.6)
    for axis, names in ((ax.xaxis, "EW"), (ax.yaxis, "NS")):
        most = 5 if wide else 2 if names == "EW" else 3
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(_degrees(names, height)))
    ax.tick_params(labelsize=7)
    for kind in (LEFT_OUT, HELD_OUT, USED):
        polygons = [p for f in footprints for p, k in f.windows if k == kind]
        ax.add_collection(
            PolyCollection(polygons, facecolor=KINDS[kind][1], alpha=0.6, linewidth=0)
        )
    outlines = [footprint.outline for footprint in footprints]
    ax.add_collection(
        PolyCollection(outlines, facecolor="none", edgecolor="black", linewidth=0.7)
    )
    for footprint in footprints:
        one_west, one_south, one_east, one_north = footprint.box
        if max((one_east - one_west) / width, (one_north - one_south) / height) < SMALL:
            kinds = {kind for _, kind in footprint.windows}
            ax.plot(
                (one_west + one_east) / 2,
                (one_south + one_north) / 2,
                marker="s",
                markersize=4,
                markerfacecolor=KINDS[min(kinds, key=list(KINDS).index)][1],
                markeredgecolor="black",
                markeredgewidth=0.5,
                alpha=0.8,
            )
    _scale(ax, middle, width * shrink * DEGREE, width, height)


def _scale(
    ax: Axes, latitude: float, ground: float, width: float, height: float
) -> None:
    """A bar of a round length, if the map has one scale; ground: its width in m."""
    if height > FLAT:
        return
    length = round_length(0.3 * ground)
    side = "N" if latitude >= 0 else "S"
    bar = AnchoredSizeBar(
        ax.transData,
        length / ground * width,
        f"{metres(length)} at {abs(latitude):.1f}° {side}",
        "lower left",
        size_vertical=height / 120,
        pad=0.4,
        borderpad=0.5,
        sep=3,
        fontproperties={"size": 7},
    )
    bar.patch.set(alpha=0.85, linewidth=0)
    ax.add_artist(bar)


def _degrees(names: str, span: float):
    """The text of a tick: degrees with as many decimals as the map needs."""
    digits = max(0, 1 - math.floor(math.log10(span)))

    def text(value: float, position: int) -> str:
        if names == "EW":
            value = (value + 180) % 360 - 180
        if abs(value) < 10**-digits / 2:
            return "0°"
        if abs(value) > 180 - 10**-digits / 2:
            return "180°"
        return f"{abs(value):.{digits}f}° {names[int(value < 0)]}"

    return text


def _notes(
    footprints: Sequence[Footprint],
    places: Sequence[Sequence[Footprint]],
    missing: Mapping[str, str],
) -> list[str]:
    """What the map does not show."""
    notes = []
    if 1 < len(places) > PLACES:
        notes.append(f"{len(places)} places, the {PLACES} with the most rasters below")
    if max(f.box[2] for f in footprints) > 180:
        notes.append("the map crosses the antimeridian (180°)")
    if missing:
        names = [f"{name} ({why})" for name, why in list(missing.items())[:SHOWN]]
        more = len(missing) - len(names)
        text = f"not on the map: {', '.join(names)}"
        text += f" and {more} more, see report.json" if more > 0 else ""
        notes += textwrap.wrap(text, 130)
    return notes
