"""Heat maps of evaluations across scales: one file per encoder, one colour range."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from xsmae.evaluation.details import percent
from xsmae.evaluation.matrices import MEANS
from xsmae.evaluation.rows import Result
from xsmae.evaluation.tables import FEATURE_NAMES
from xsmae.figures.style import save

STEP = 5  # percent; the ends of the colour range are multiples of it
COLOURS = "Blues"


def colour_range(rows: Sequence[Result]) -> tuple[float, float]:
    """The least range in steps of `STEP` percent with all cells of the rows."""
    values = 100 * np.concatenate([np.ravel(_values(row)) for row in rows])
    steps = np.round(values / STEP, 6)  # 100 * 0.55 is above 55
    low, high = np.floor(steps.min()), np.ceil(steps.max())
    if low == high:
        low, high = max(low - 1, 0), max(high, 1)
    return float(STEP * low), float(STEP * high)


def heat_map(
    path: str | os.PathLike,
    rows: Sequence[Result],
    name: str,
    *,
    data: str,
    limits: tuple[float, float],
) -> None:
    """Draw the cells of an encoder's rows: one panel per feature.

    Frames mark cells with equal scales. name, data: the names of the encoder and the
    data in the table. limits: the colour range in percent, see `colour_range`.
    """
    side = 1.6 + 1.0 * len(rows[0].scales)
    fig = Figure(figsize=(side * len(rows) + 1.4, side + 1.1), layout="constrained")
    axes = fig.subplots(1, len(rows), squeeze=False)[0]
    for ax, row in zip(axes, rows, strict=True):
        image = _panel(ax, row, limits)
    first, protocol = rows[0], rows[0].protocol
    bar = fig.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"{protocol.metric} (%), one range for all encoders", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    axes[0].set_ylabel("bank: scale of the training images", fontsize=10)
    level = 100 * protocol.interval["level"]
    title = (
        f"{data}, {protocol.title}: {name}",
        f"{first.num_train:,} training and {first.num_test:,} test images; below each "
        f"{protocol.metric} its {level:g} % interval",
    )
    # About eleven characters per inch keep the title within the figure.
    width = int(11 * fig.get_figwidth())
    title = "\n".join(textwrap.fill(line, width) for line in title)
    fig.suptitle(title, fontsize=11)
    save(fig, path)


def _panel(ax: Axes, row: Result, limits: tuple[float, float]) -> AxesImage:
    low, high = limits
    values = 100 * _values(row)
    image = ax.imshow(values, cmap=COLOURS, vmin=low, vmax=high)
    for (bank, queries), value in np.ndenumerate(values):
        dark = value > low + 0.65 * (high - low)
        text = {"ha": "center", "color": "white" if dark else "black"}
        _, least, most = row.cells[bank][queries]
        interval = f"{100 * least:.0f} to {100 * most:.0f}"
        ax.text(queries, bank, f"{value:.1f}", va="bottom", fontsize=11, **text)
        ax.text(queries, bank + 0.12, interval, va="top", fontsize=8, **text)
    for place in range(len(values)):
        corner = (place - 0.5, place - 0.5)
        frame = Rectangle(corner, 1, 1, fill=False, lw=1.6, ec="black", clip_on=False)
        ax.add_patch(frame)
    told = row.gsd_told or [None] * len(row.scales)
    labels = [
        f"{scale:g} %\n{size} px" + (f"\n{gsd:.3g} m/px" if gsd else "")
        for scale, size, gsd in zip(row.scales, row.size, told, strict=True)
    ]
    ax.set_xticks(range(len(labels)), labels, fontsize=9)
    ax.set_yticks(range(len(labels)), labels, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("queries: scale of the test images", fontsize=10)
    feature = FEATURE_NAMES.get(row.feature)
    means = [f"{MEANS[key]}: {percent(*mean)}" for key, mean in row.metrics.items()]
    lines = [*[f"feature: {feature}"] * bool(feature), *means]
    ax.set_title("\n".join(lines), fontsize=9)
    return image


def _values(row: Result) -> np.ndarray:
    """The cells without their intervals, in 0-1."""
    return np.array(row.cells)[..., 0]
