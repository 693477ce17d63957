"""Test images beside their masks and the predicted classes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from xsmae.bands import Bands
from xsmae.data.mask_classes import IGNORE
from xsmae.data.masks import MaskRecord, Segmentation
from xsmae.evaluation.segmentation.kept import Kept, read_kept
from xsmae.evaluation.segmentation.parts import MaskParts
from xsmae.figures.mask_sheet import class_colours
from xsmae.figures.style import LEGEND, end_of, in_colour, save, scale_bar, show

PICTURE = "examples.png"


def draw_examples(folder: Path, parts: MaskParts, title: str) -> None:
    """Draw the examples of a result into its folder."""
    triplets(folder / PICTURE, parts.test, read_kept(folder), parts.bands, title)


def triplets(
    path: str | os.PathLike, source: Segmentation, kept: Kept, bands: Bands, title: str
) -> None:
    """Draw the examples of a result: the image, its mask, the prediction.

    Pixels that do not count are white in both. source: the test part.
    """
    names = source.class_names
    colours = class_colours(source.colours, len(names))
    rows, legend_rows = len(kept.examples), math.ceil((len(names) + 1) / 5)
    size = (9, 3 * rows + 0.3 * legend_rows + 0.6)
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, 3, squeeze=False)
    for line, (index, (step, predicted)) in zip(
        axes, sorted(kept.examples.items()), strict=True
    ):
        record = source[index]
        mask = record.mask[::step, ::step]
        ignored = mask == IGNORE
        show(line[0], _in_colour(record, step, bands))
        scale_bar(line[0], mask.shape[1], record.gsd[1] * step)
        show(line[1], colours[np.where(ignored, len(names), mask)])
        show(line[2], colours[np.where(ignored, len(names), predicted)])
        line[0].set_title(end_of(record.id, 34), fontsize=8)
        line[1].set_title("mask", fontsize=8)
        line[2].set_title(f"predicted, {_right(mask, predicted)} right", fontsize=8)
    fig.suptitle(title, fontsize=10)
    patches = [
        Patch(facecolor=colour / 255, edgecolor="black", linewidth=0.5, label=name)
        for colour, name in zip(colours, [*names, "ignored"], strict=True)
    ]
    fig.legend(handles=patches, loc="outside lower center", ncols=5, **LEGEND)
    save(fig, path)


def _in_colour(record: MaskRecord, step: int, bands: Bands) -> np.ndarray:
    """Every `step`-th pixel of an image, as it is shown."""
    image = record.image[::step, ::step]
    if record.valid is None:
        return in_colour(image, bands)
    valid = record.valid[::step, ::step]
    if not valid.any():
        return in_colour(np.zeros_like(image), bands)
    image = np.where(valid[..., None], image, 0)
    mean = image.sum(axis=(0, 1)) / valid.sum()
    return in_colour(np.where(valid[..., None], image, mean), bands)


def _right(mask: np.ndarray, predicted: np.ndarray) -> str:
    """The share of pixels that are right, of those that count."""
    counted = mask != IGNORE
    return f"{(mask == predicted)[counted].mean():.0%}" if counted.any() else "none"
