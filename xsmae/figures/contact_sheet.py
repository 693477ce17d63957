"""A sheet of images from a data set, with classes, GSDs and scale bars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from xsmae.bands import TRUE_COLOUR, Bands
from xsmae.data.records import Record
from xsmae.figures.style import (
    end_of,
    geometric_mean,
    in_colour,
    number,
    per_axis,
    save,
    scale_bar,
    show,
)


def contact_sheet(
    path: str | os.PathLike,
    records: Sequence[Record],
    class_names: Sequence[str],
    bands: Bands,
    colours: Sequence[str] | None = None,
) -> None:
    """Draw the records as a PNG, six per row.

    colours: the names of three bands to show as red, green and blue. Pixels without a
    value are hatched.
    """
    columns = min(6, len(records))
    rows = math.ceil(len(records) / columns)
    fig = Figure(figsize=(2.5 * columns, 3.1 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    places = bands.colours() if colours is None else tuple(bands.places(colours))
    for ax, record in zip(axes.flat, records, strict=False):
        y, x = per_axis(record.gsd)
        _show(ax, in_colour(record.image, bands, places), record.valid)
        scale_bar(ax, record.image.shape[1], x)
        height, width = record.image.shape[:2]
        name = "" if record.label is None else f"{class_names[record.label]}\n"
        text = f"{width} × {height} px, {number(geometric_mean((y, x)))} m/px"
        ax.set_title(f"{name}{end_of(record.id, 34)}\n{text}", fontsize=8)
    for ax in np.ravel(axes)[len(records) :]:
        ax.set_axis_off()
    if bands.dtype != "uint8":
        gaps = any(r.valid is not None and not r.valid.all() for r in records)
        fig.suptitle(_stretch(bands, places, gaps=gaps), fontsize=10)
    save(fig, path)


def _show(ax, image: np.ndarray, valid: np.ndarray | None) -> None:
    if valid is not None and not valid.all():
        image = np.concatenate([image, valid[..., None].astype(image.dtype)], axis=-1)
    show(ax, image)
    ax.patch.set(facecolor="white", edgecolor="0.75", hatch="////")


def _stretch(bands: Bands, places: Sequence[int], *, gaps: bool) -> str:
    """Which bands are shown, and which values are black and white."""
    names = tuple(bands.names[place] for place in places)
    if len(set(names)) == 1:
        kind = "grey"
    else:
        kind = "true colour" if names in TRUE_COLOUR else "false colour"
    ranges = [
        f"{name} {_value(bands.mean[place] - 2 * bands.std[place])} to "
        f"{_value(bands.mean[place] + 2 * bands.std[place])}"
        for name, place in dict(zip(names, places, strict=True)).items()
    ]
    text = f"{kind}, black to white: {', '.join(ranges)}\n{bands.units}"
    return text + ("; pixels without a value are hatched" if gaps else "")


def _value(value: float) -> str:
    return f"{value:.3g}"
