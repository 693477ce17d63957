"""A sheet of images beside their masks, with the colours of the classes."""

from __future__ import annotations

import colorsys
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from xsmae.bands import Bands
from xsmae.data.mask_classes import IGNORE
from xsmae.data.masks import MaskRecord, Segmentation
from xsmae.data.square import filled
from xsmae.figures.style import (
    LEGEND,
    end_of,
    geometric_mean,
    in_colour,
    number,
    save,
    scale_bar,
    show,
)

if TYPE_CHECKING:
    from jaxtyping import UInt8

_IGNORED = (255, 255, 255)  # white, with a frame in the legend
_SHOWN = 512  # pixels, the longer side of a picture
_TURN = (math.sqrt(5) - 1) / 2  # of hues: no two of many classes are close


def class_colours(
    colours: Sequence[tuple[int, int, int]], count: int
) -> UInt8[np.ndarray, "classes rgb"]:
    """The given colours, or hues that differ if there are none; then `_IGNORED`."""
    found = list(colours) or [
        tuple(
            round(255 * part)
            for part in colorsys.hsv_to_rgb(i * _TURN % 1, 0.75, (0.9, 0.6)[i % 2])
        )
        for i in range(count)
    ]
    return np.array([*found, _IGNORED], np.uint8)


def mask_sheet(
    path: str | os.PathLike,
    source: Segmentation,
    indices: Sequence[int],
    bands: Bands,
) -> None:
    """Draw images as a PNG, three per row, each with its mask to the right."""
    columns = min(3, len(indices))
    rows = math.ceil(len(indices) / columns)
    names = source.class_names
    table = class_colours(source.colours, len(names))
    legend_rows = math.ceil((len(names) + 1) / (4 * columns))
    size = (5 * columns, 2.9 * rows + 0.3 * legend_rows)
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, 2 * columns, squeeze=False)
    for (left, right), index in zip(axes.reshape(-1, 2), indices, strict=False):
        record = source[index]
        height, width = record.mask.shape
        text = f"{width} × {height} px, {number(geometric_mean(record.gsd))} m/px"
        left.set_title(f"{end_of(record.id, 34)}\n{text}", fontsize=8)
        labelled = (record.mask != IGNORE).mean()
        right.set_title(f"{labelled:.0%} labelled", fontsize=8)
        small = _small(record)
        known = small.valid is None or small.valid.any()
        show(left, in_colour(filled(small) if known else small.image, bands))
        scale_bar(left, small.mask.shape[1], small.gsd[1])
        show(right, table[np.where(small.mask == IGNORE, len(names), small.mask)])
    for ax in axes.ravel()[2 * len(indices) :]:
        ax.set_axis_off()
    patches = [
        Patch(facecolor=colour / 255, edgecolor="black", linewidth=0.5, label=name)
        for colour, name in zip(table, [*names, "ignored"], strict=True)
    ]
    fig.legend(handles=patches, loc="outside lower center", ncols=4 * columns, **LEGEND)
    save(fig, path)


def _small(record: MaskRecord) -> MaskRecord:
    """Every n-th pixel, so that a sheet of large rasters fits into memory."""
    step = math.ceil(max(record.mask.shape) / _SHOWN)
    part = np.s_[::step, ::step]
    return dataclasses.replace(
        record,
        image=record.image[part].copy(),
        valid=None if record.valid is None else record.valid[part].copy(),
        mask=record.mask[part].copy(),
        gsd=tuple(side * step for side in record.gsd),
    )
