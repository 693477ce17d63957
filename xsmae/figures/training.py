"""Figures of a run: reconstructions, crops, loss curves, the GSDs in training.

They use only `matplotlib.figure.Figure`, so a caller's pyplot state does not change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from xsmae.bands import Bands
from xsmae.evaluation.intervals import LEVEL, accuracy_interval
from xsmae.figures.style import (
    ALARM,
    LEGEND,
    NEUTRAL,
    VIEW_COLOURS,
    end_of,
    geometric_mean,
    label_axes,
    number,
    per_axis,
    save,
    scale_bar,
    show,
    title_with_gsd,
    to_pixels,
)
from xsmae.methods import METHODS

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped
    from matplotlib.axes import Axes

    from xsmae.figures.style import Gsd
    from xsmae.methods import Pictures

HIDDEN_GREY = np.float32(0.5)
LOSS_UNITS = {"loss": "weighted sum of the terms"} | {
    f"loss/{name}": unit
    for method in METHODS.values()
    for name, unit in method.units.items()
}


def reconstructions(
    path: str | os.PathLike,
    pictures: Pictures,
    gsd: Float[np.ndarray, "n views 2"],
    *,
    bands: Bands,
    note: str = "",
) -> None:
    """One row per sample; per view its input, the visible patches, the predictions.

    gsd: metres per pixel, (y, x). note: a line below the pictures.
    """
    hidden = np.asarray(pictures.hidden)
    if bands.dtype != "uint8":
        hidden = hidden[..., list(bands.colours())]
    shown = to_pixels(pictures.images, bands)
    panels = {
        "input": shown,
        f"{100 * hidden.mean():.0f} % hidden": np.where(hidden, HIDDEN_GREY, shown),
        **{
            title: to_pixels(images, bands)
            for title, images in zip(pictures.titles, pictures.panels, strict=True)
        },
    }
    num_rows, num_views = shown.shape[:2]
    # A narrow empty column separates the views.
    widths = ([*[1] * len(panels), 0.08] * num_views)[:-1]
    size = (1.75 * sum(widths), 1.75 * num_rows + 0.3)
    fig = Figure(figsize=size, layout="compressed")
    grid = fig.add_gridspec(num_rows, len(widths), width_ratios=widths)
    for row, view in np.ndindex(num_rows, num_views):
        for column, (name, images) in enumerate(panels.items()):
            ax = fig.add_subplot(grid[row, (len(panels) + 1) * view + column])
            show(ax, images[row, view])
            if row == 0:
                title = f"View {view + 1}: {name}" if num_views > 1 else name
                ax.set_title(title, fontsize=10)
            if column == 0:
                gsd_text = number(geometric_mean(gsd[row, view]))
                ax.set_ylabel(f"{gsd_text} m/px", fontsize=9)
    if note:
        fig.supxlabel(note, fontsize=9)
    save(fig, path)


def crops(
    path: str | os.PathLike,
    sources: Sequence[tuple[Shaped[np.ndarray, "height width 3"], Gsd, str]],
    views: Shaped[np.ndarray, "n views size size 3"],
    boxes: Float[np.ndarray, "n views 4"],
    gsd: Float[np.ndarray, "n views 2"],
) -> None:
    """One row per sample: the source with the views' boxes, then the views.

    sources: image, metres per pixel or (y, x), title. boxes: (top, left, bottom, right)
    in source pixels. gsd: metres per pixel of the views, (y, x).
    """
    num_rows, num_views, size = views.shape[:3]
    columns = 1 + num_views
    fig = Figure(figsize=(3.1 * columns, 3.9 * num_rows + 0.4), layout="compressed")
    axes = fig.subplots(num_rows, columns, squeeze=False)
    for row, (image, source_gsd, title) in zip(range(num_rows), sources, strict=True):
        source_ax = axes[row, 0]
        show(source_ax, image)
        source_gsd = per_axis(source_gsd)
        title_with_gsd(source_ax, end_of(title, 40), source_gsd, image.shape)
        scale_bar(source_ax, image.shape[1], source_gsd[1])
        for view, ax in enumerate(axes[row, 1:]):
            _draw_box(source_ax, boxes[row, view], VIEW_COLOURS[view])
            show(ax, views[row, view])
            title_with_gsd(ax, f"View {view + 1}", gsd[row, view], (size, size))
            ax.spines[:].set(visible=True, color=VIEW_COLOURS[view], linewidth=4)
    fig.legend(
        handles=[
            Rectangle((0, 0), 1, 1, fill=False, ec=colour, lw=2.5, label=f"view {view}")
            for view, colour in enumerate(VIEW_COLOURS[:num_views], 1)
        ],
        loc="outside lower center",
        ncols=num_views,
        title="Height × width. Views are stretched to a square and may be mirrored.",
        title_fontsize=9,
        **LEGEND,
    )
    save(fig, path)


def loss_curves(
    path: str | os.PathLike,
    rows: Sequence[Mapping[str, object]],
    *,
    knn_images: int | None = None,
) -> None:
    """Plot the total loss, each loss term, the learning rate and the kNN accuracy.

    knn_images: how many images each accuracy is of; None: no intervals. rows: from
    `metrics.jsonl`. A value that is null, NaN or infinite is a gap in the curve and a
    mark at the bottom of the panel. `loss/<term>_view<n>` is drawn in the panel of its
    term.
    """
    names = {name for row in rows for name in row}
    terms = sorted(n for n in names if n.startswith("loss/") and "_view" not in n)
    columns = 2 if len(terms) == 3 else min(3, 1 + len(terms))
    lines = math.ceil((1 + len(terms)) / columns)
    fig = Figure(figsize=(max(4.5 * columns, 8), 3 * lines + 2.6), layout="constrained")
    losses, below = fig.add_gridspec(2, 1, height_ratios=(3 * lines, 2.6))
    losses = losses.subgridspec(lines, columns)
    for index, name in enumerate(["loss", *terms]):
        _curves(fig.add_subplot(losses[index]), rows, name, names)
    if any(name.startswith("knn/") for name in names):
        knn, below = below.subgridspec(1, 2, width_ratios=(3, 1))
        _knn(fig.add_subplot(knn), rows, knn_images)
    ax = fig.add_subplot(below)
    ax.plot(*_series(rows, "learning_rate"), ".-", color=NEUTRAL, markersize=3)
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    label_axes(ax, "learning rate", "step", "")
    save(fig, path)


def gsd_histogram(
    path: str | os.PathLike,
    gsd: Float[np.ndarray, "n views 2"],
    *,
    source_gsd: Float[np.ndarray, " n"],
) -> None:
    """Plot histograms of the views' GSDs and of their source images' GSDs.

    Both in metres per pixel. A view's GSD is the geometric mean of its axes.
    """
    values = np.concatenate([np.ravel(gsd), source_gsd]).astype(np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("a GSD is not a positive number of metres per pixel")
    seen = geometric_mean(gsd)
    low = min(seen.min(), source_gsd.min())
    high = max(seen.max(), source_gsd.max())
    # Span at least a factor of 4, so that the axis has several ticks.
    margin = max(1.1, 2 / math.sqrt(high / low))
    edges = np.geomspace(low / margin, high * margin, 61)
    fig = Figure(figsize=(8, 4), layout="constrained")
    ax = fig.subplots()
    for view, of_view in enumerate(seen.T):
        colour = VIEW_COLOURS[view]
        style = {"histtype": "stepfilled", "fc": (colour, 0.35), "ec": colour}
        _share(ax, of_view, edges, f"view {view + 1}", lw=1.8, **style)
    style = {"color": NEUTRAL, "ls": "--", "lw": 1.5}
    # Not exact equality: a caller may have computed the GSD from a crop.
    if np.ptp(np.log(source_gsd)) < 1e-4:
        label = f"source images, {number(source_gsd[0])} m/px"
        ax.axvline(source_gsd[0], label=label, **style)
    else:
        _share(ax, source_gsd, edges, "source images", histtype="step", **style)
    ax.set(xscale="log", xlim=(edges[0], edges[-1]))
    title = f"Ground sample distance of the views of {len(seen):,} samples"
    label = "metres per pixel, geometric mean of the axes (left is finer)"
    label_axes(ax, title, label, "share (%)")
    digits = (1, 2, 5) if edges[-1] / edges[0] > 10 else (1, 1.5, 2, 3, 4, 5, 7)
    ax.xaxis.set_major_locator(LogLocator(subs=digits))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    fig.legend(loc="outside lower center", ncols=3, **LEGEND)
    save(fig, path)


def _share(ax: Axes, gsd: np.ndarray, edges: np.ndarray, name: str, **style) -> None:
    """A histogram in percent, independent of the number of samples."""
    label = f"{name}, median {number(np.median(gsd))} m/px"
    ax.hist(gsd, edges, weights=np.full(len(gsd), 100 / len(gsd)), label=label, **style)


def _draw_box(ax: Axes, box: np.ndarray, colour: str) -> None:
    # Boxes start at the corner of the first pixel, imshow at its centre.
    top, left, bottom, right = np.asarray(box, np.float64) - 0.5
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour)
    frame.set(linewidth=2.5, clip_on=False)
    frame.set_path_effects([withStroke(linewidth=4.5, foreground="white")])
    ax.add_patch(frame)


def _series(rows: Sequence[Mapping], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values of a metric; null and non-finite values become NaN."""
    found = {row["step"]: row[name] for row in rows if name in row}
    steps = np.array(sorted(found), np.float64)
    values = np.array([found[step] for step in steps], np.float64)  # None becomes NaN
    return steps, np.where(np.isfinite(values), values, np.nan)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean over the finite values of a window; NaN stays NaN."""
    if not len(values):
        return values
    finite, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(finite, values, 0), kernel, "same")
    count = np.convolve(finite, kernel, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _curves(ax: Axes, rows: Sequence[Mapping], name: str, names: set[str]) -> None:
    """Plot one loss, and its parts by view if it has any."""
    parts = sorted(part for part in names if part.startswith(f"{name}_view"))
    steps, values = _series(rows, name)
    # About 2 % of the run.
    window = 2 * (len(steps) // 100) + 1
    for part, colour in zip([name, *parts], ("black", *VIEW_COLOURS), strict=False):
        at, value = _series(rows, part)
        ax.plot(at, value, ".", color=colour, alpha=0.2, markersize=5, mew=0)
        label = f"view {part.rpartition('_view')[2]}" if part != name else "all views"
        # Mark each value if there are few: a single value would draw no line.
        line = ".-" if window == 1 else "-"
        ax.plot(at, _running_mean(value, window), line, color=colour, label=label)
    title = "total loss" if name == "loss" else name.removeprefix("loss/")
    lost = steps[np.isnan(values)]
    if len(lost):
        title += f" ({len(lost)} logged values not finite)"
        mark = {"color": ALARM, "markersize": 14, "transform": ax.get_xaxis_transform()}
        ax.plot(lost, np.zeros(len(lost)), "|", **mark)
    if parts:  # losses fall, so this corner is free
        ax.legend(loc="upper right", **LEGEND)
    smoothing = f" (line: running mean of {window} logged values)" if window > 1 else ""
    label_axes(ax, title, f"step{smoothing}", LOSS_UNITS.get(name, "loss"))


def _knn(ax: Axes, rows: Sequence[Mapping], images: int | None) -> None:
    """Plot the encoder's accuracy; horizontal lines are the controls.

    images: how many each accuracy is of; None: no intervals.
    """
    mean, token = VIEW_COLOURS[:2]
    # The second of each pair is thinner, so that equal curves are both visible.
    for name, label, colour, style, width in (
        ("accuracy_mean", "encoder, patch mean", mean, "o-", 3.5),
        ("accuracy_cls", "encoder, class token", token, "s-", 1.3),
        ("random_encoder_mean", "random encoder, patch mean", mean, "--", 3.5),
        ("random_encoder_cls", "random encoder, class token", token, "--", 1.3),
        ("image_statistics", "image statistics", NEUTRAL, ":", 1.5),
    ):
        steps, values = _series(rows, f"knn/{name}")
        if not len(values):
            continue
        line = {"color": colour, "lw": width, "label": f"{label}: {values[-1]:.1%}"}
        if name.startswith("accuracy"):
            ax.plot(steps, 100 * values, style, markersize=2.5 + width, **line)
            if images:
                ends = [_interval(value, images) for value in values]
                bars = {"color": colour, "lw": width, "alpha": 0.35}
                ax.vlines(steps, *100 * np.transpose(ends), **bars)
        else:
            ax.axhline(100 * values[-1], ls=style, **line)
    bars = f"; bars: {100 * LEVEL:g} % intervals" if images else ""
    title = f"kNN accuracy (legend: the latest{bars})"
    label_axes(ax, title, "step", "accuracy (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), **LEGEND)


def _interval(accuracy: float, images: int) -> tuple[float, float]:
    """NaN where it is unknown."""
    known = np.isfinite(accuracy) and accuracy_interval(accuracy, images, seed=0)
    return known or (math.nan, math.nan)
