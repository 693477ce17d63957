"""A sheet of images from a data set, with classes, GSDs and scale bars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from xsmae.bands import Bands
from xsmae.data.records import Record
from xsmae.data.square import filled
from xsmae.figures.style import (
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
) -> None:
    """Draw the records as a PNG, six per row."""
    columns = min(6, len(records))
    rows = math.ceil(len(records) / columns)
    fig = Figure(figsize=(2.5 * columns, 3.1 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax, record in zip(axes.flat, records, strict=False):
        y, x = per_axis(record.gsd)
        show(ax, in_colour(filled(record), bands))
        scale_bar(ax, record.image.shape[1], x)
        height, width = record.image.shape[:2]
        name = "" if record.label is None else f"{class_names[record.label]}\n"
        text = f"{width} × {height} px, {number(geometric_mean((y, x)))} m/px"
        ax.set_title(f"{name}{record.id[-34:]}\n{text}", fontsize=8)
    for ax in np.ravel(axes)[len(records) :]:
        ax.set_axis_off()
    save(fig, path)
