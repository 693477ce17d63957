"""The distribution of the values of each band."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from xsmae.bands import Bands
from xsmae.figures.style import NEUTRAL, VIEW_COLOURS, save

BINS = 64
TAIL = 0.1  # percent of the pixels beyond each end of an axis
LEVELS = 4096  # a band with at most so many different values is binned by them


def histograms(
    path: str | os.PathLike,
    pixels: np.ndarray,
    bands: Bands,
    wavelengths: Sequence[float | None] | None = None,
) -> None:
    """Draw one panel per band as a PNG, four per row.

    pixels: [pixels, bands], values in the units of `bands.mean`. wavelengths: of each
    band, in nm.
    """
    count = len(bands.names)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    fig = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.5), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    unit = textwrap.fill(bands.units, 38)
    for i, ax in enumerate(np.ravel(axes)[:count]):
        values = pixels[:, i]
        edges = _edges(values)
        shown = np.full(len(values), 100 / len(values))
        ax.hist(values, edges, weights=shown, color=VIEW_COLOURS[0])
        mean, std = bands.mean[i], bands.std[i]
        ax.axvspan(mean - std, mean + std, color=VIEW_COLOURS[1], alpha=0.2, lw=0)
        ax.axvline(mean, color=NEUTRAL, linestyle="--", linewidth=1.2)
        ax.set_xlim(edges[0], edges[-1])
        length = None if wavelengths is None else wavelengths[i]
        suffix = "" if length is None else f", {length:g} nm"
        ax.set_title(
            f"{bands.names[i]}{suffix}\nmean {mean:.4g}, std {std:.4g}", fontsize=9
        )
        ax.set_xlabel(unit, fontsize=7)
        ax.set_ylabel("% of pixels", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in np.ravel(axes)[count:]:
        ax.set_axis_off()
    fig.suptitle(
        f"{len(pixels):,} valid pixels, as many of each image; dashed: mean, shaded: "
        f"± 1 std\n{TAIL:g} % of the pixels may lie beyond each end of an axis",
        fontsize=9,
    )
    save(fig, path)


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of bins; of numbers with few levels, as many levels in each bin."""
    low, high = (float(x) for x in np.percentile(values, [TAIL, 100 - TAIL]))
    if low == high:
        wide = max(abs(low), 1.0) * 0.05
        return np.linspace(low - wide, high + wide, BINS + 1)
    levels = np.unique(values)
    if len(levels) <= LEVELS:
        step = float(np.diff(levels).min())
        if (high - low) / step <= LEVELS:
            # Bins that hold 1 and 2 levels in turn would look like a comb.
            width = step * math.ceil((high - low) / step / BINS)
            number = math.ceil((high - low) / width + 0.5)
            return low - step / 2 + width * np.arange(number + 1)
    return np.linspace(low, high, BINS + 1)
