"""Figures of results: accuracy by scale, confusion matrices."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from xsmae.evaluation.rows import AVERAGE, Result
from xsmae.evaluation.tables import FEATURE_NAMES, Line, Table, keeps_size
from xsmae.figures.fonts import drawable
from xsmae.figures.style import LEGEND, VIEW_COLOURS, save

COLOURS = (*VIEW_COLOURS, "#56B4E9", "#D55E00", "#8C564B", "#332288")
# Five dashes and six colours have no common factor, so combinations repeat late.
DASHES = ("-", (0, (5, 2)), (0, (2, 1.2)), (0, (7, 2, 1.5, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CONTROL_STYLES = {
    "random": ("#555555", "--"),
    "thumbnail": ("#888888", "-."),
    "statistics": ("#222222", ":"),
}
NAMED_CLASSES = 30  # with more classes, counts do not fit
LONGEST_NAME = 32  # characters of a class name before it is cut


def accuracy_by_scale(path: str | os.PathLike, table: Table) -> bool:
    """Plot accuracy over scales: one line per encoder, one panel per feature.

    Bars show intervals. Pixel controls have a single feature and appear in every panel.
    Returns False, and draws nothing, if there are fewer than two scales.
    """
    percents = sorted({c[0] for c in table.columns if c[0] != AVERAGE})
    if len(percents) < 2:
        return False
    features = [n for n in FEATURE_NAMES if any(ln.feature == n for ln in table.lines)]
    features = features or [None]
    fig = Figure(figsize=(max(4.6 * len(features), 7), 5.6), layout="constrained")
    axes = fig.subplots(1, len(features), sharey=True, squeeze=False)[0]
    styles = _styles(table)
    for ax, feature in zip(axes, features, strict=True):
        # Segmentation has no feature of whole images: one panel shows all lines.
        lines = [
            ln
            for ln in table.lines
            if feature is None or ln.feature in (feature, ln.kind)
        ]
        for line, shift in zip(lines, _shifts(len(lines), percents), strict=True):
            _line(ax, line, shift, label=line.name, **styles[line.name])
        _axis(ax, percents, table)
        if feature is not None:
            ax.set_title(f"feature: {FEATURE_NAMES[feature]}", fontsize=11)
    axes[0].set_ylabel(f"{table.protocol.metric} (%)", fontsize=10)
    # About eleven characters per inch keep the title within the panels.
    title = _title(table, int(11 * fig.get_figwidth()))
    fig.suptitle(title, fontsize=11)
    handles = dict(
        (text, handle)
        for ax in axes
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    )
    fig.legend(
        handles.values(), handles, loc="outside lower center", ncols=2,
        handlelength=4, **LEGEND,
    )  # fmt: skip
    save(fig, path)
    return True


def _shifts(lines: int, percents: list[float]) -> np.ndarray:
    """A factor for the scales of each line, so that intervals do not hide each other.

    A line's bars are one cap apart from the next line's, unless all of them would fill
    more than a third of the way to the next scale.
    """
    gap = min(b / a for a, b in itertools.pairwise(percents))
    step = min(1.03, gap ** (1 / (3 * max(lines - 1, 1))))
    return step ** (np.arange(lines) - (lines - 1) / 2)


def _styles(table: Table) -> dict[str, dict]:
    """The style of each name in a table, so that equal curves are all visible.

    Later lines are drawn over earlier ones, so they are thinner and dashed. Controls
    are on top.
    """
    encoders, controls = (
        list(dict.fromkeys(ln.name for ln in table.lines if test(ln.kind)))
        for test in (lambda k: k not in CONTROL_STYLES, CONTROL_STYLES.__contains__)
    )
    kinds = {line.name: line.kind for line in table.lines}
    styles = {}
    for index, name in enumerate(encoders):
        styles[name] = {
            "color": COLOURS[index % len(COLOURS)],
            "ls": DASHES[index % len(DASHES)],
            "marker": MARKERS[index % len(MARKERS)],
            "lw": max(4 - 0.8 * index, 1.6),
            "zorder": 2 + index / len(encoders),
        }
    for index, name in enumerate(controls):
        colour, dashes = CONTROL_STYLES[kinds[name]]
        marker = MARKERS[-1 - index % len(MARKERS)]
        styles[name] = {"color": colour, "ls": dashes, "marker": marker, "lw": 1.3}
        styles[name]["zorder"] = 3 + index / len(controls)
    return styles


def _title(table: Table, width: int) -> str:
    protocol = table.protocol
    data, level = protocol.data, protocol.interval["level"]
    options = ", ".join(f"{k}={v}" for k, v in protocol.options.items())
    told = "that scale's" if protocol.gsd_policy == "true" else "the 100 %"
    lines = (
        f"{table.data}: {protocol.title} {protocol.metric} over scales, "
        f"{data['train']['images']:,} training and {data['test']['images']:,} test "
        "images",
        options,
        f"at each scale the encoder gets {told} GSD; bars: {100 * level:g} % intervals",
    )
    return "\n".join(textwrap.fill(line, width) for line in lines)


def _line(ax: Axes, line: Line, shift: float, **style) -> None:
    rows = [row for column, row in line.cells.items() if column[0] != AVERAGE]
    rows.sort(key=lambda row: row.scale)
    value, low, high = 100 * np.array([(r.value, r.low, r.high) for r in rows]).T
    ax.errorbar(
        shift * np.array([row.scale for row in rows]),
        value,
        [np.maximum(value - low, 0), np.maximum(high - value, 0)],
        markersize=5,
        capsize=3,
        elinewidth=1,
        **style,
    )


def _axis(ax: Axes, percents: list[float], table: Table) -> None:
    """A logarithmic axis of scales, labelled with percent, pixels and GSD."""
    sizes = {p: sorted({c[1] for c in table.columns if c[0] == p}) for p in percents}
    told: dict[float, set[str]] = {percent: set() for percent in percents}
    for line in table.lines:
        for column, row in line.cells.items():
            if column[0] != AVERAGE and row.gsd_told:
                told[column[0]].add(f"{row.gsd_told:.3g} m/px")

    def tick(percent: float) -> str:
        pixels = "/".join(map(str, sizes[percent]))
        return "\n".join([f"{percent:g} %", f"{pixels} px", *sorted(told[percent])])

    ax.set_xscale("log", base=2)
    ax.set_xticks(percents)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([tick(percent) for percent in percents])
    ax.set_xlim(percents[0] / 1.25, percents[-1] * 1.25)
    label = "scale: side of the image that the encoder sees"
    if keeps_size(table.protocol):
        label = "scale: percent of the images' own size; side of a window"
    ax.set_xlabel(label, fontsize=9)
    ax.tick_params(labelsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def class_bars(
    path: str | os.PathLike, rows: Sequence[tuple[Result, Line]], table: Table
) -> None:
    """Plot the metric of each class as bars, one per row; for segmentation.

    A class without a true or a predicted pixel has no bar.
    """
    names = rows[0][0].class_names
    fig = Figure(
        figsize=(max(7, (0.3 + 0.22 * len(rows)) * len(names) + 2), 5),
        layout="constrained",
    )
    ax, styles, width = fig.subplots(), _styles(table), 0.8 / len(rows)
    for place, (row, line) in enumerate(rows):
        heights = [100 * row.per_class.get(name, np.nan) for name in names]
        shift = (place - (len(rows) - 1) / 2) * width
        ax.bar(
            np.arange(len(names)) + shift,
            heights,
            width,
            color=styles[line.name]["color"],
            label=f"{line.name}: {row.protocol.metric} {100 * row.value:.1f} %",
        )
    shown = [_class_name(index, name) for index, name in enumerate(names)]
    ax.set_xticks(range(len(names)), shown, rotation=30, ha="right", fontsize=9)
    ax.set_ylabel(f"{table.protocol.metric.removeprefix('m')} (%)", fontsize=10)
    ax.set_ylim(0, 100)
    ax.set_axisbelow(True)
    ax.grid(axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{table.heading}: each class at 100 %", fontsize=11)
    fig.legend(loc="outside lower center", ncols=1, **LEGEND)
    save(fig, path)


def confusion_matrix(
    path: str | os.PathLike, row: Result, name: str, *, data: str
) -> None:
    """Plot the confusion matrix; colours show percent of the true class.

    Cells show counts, of pixels percent, unless there are too many classes. name, data:
    the names of the encoder and the data in the table.
    """
    # A class without test images has no accuracy and an empty row.
    counts, classes = np.array(row.confusion), row.class_names
    share = 100 * counts / np.maximum(counts.sum(axis=1), 1)[:, None]
    pixels = keeps_size(row.protocol)  # millions do not fit: show percent instead
    side = max(6.0, 0.34 * len(classes) + 2.6)
    fig = Figure(figsize=(side + 1.2, side), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    fig.colorbar(image, ax=ax, shrink=0.75, label="percent of the true class")
    ticks = range(len(classes))
    names = [_class_name(index, name) for index, name in enumerate(classes)]
    ax.set_xticks(ticks, names, rotation=90, fontsize=8)
    accuracy = [
        f"{name}  {100 * row.per_class[c]:.0f} %" if c in row.per_class else name
        for c, name in zip(classes, names, strict=True)
    ]
    ax.set_yticks(ticks, accuracy, fontsize=8)
    if len(classes) <= NAMED_CLASSES:
        for true, predicted in zip(*np.nonzero(counts), strict=True):
            ax.text(
                predicted,
                true,
                f"{share[true, predicted]:.0f}" if pixels else counts[true, predicted],
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share[true, predicted] > 55 else "black",
            )
    ax.set_xlabel("predicted class", fontsize=10)
    metric = row.protocol.metric
    of_class = metric.removeprefix("m")
    ax.set_ylabel(f"true class, and its {of_class}", fontsize=10)
    value, low, high = (100 * x for x in (row.value, row.low, row.high))
    feature = FEATURE_NAMES.get(row.feature, row.feature)
    ax.set_title(
        f"{data}, {row.protocol.title}: {name}, {feature}\n"
        f"{row.num_test:,} test images at {row.scale:g} % ({row.size} px), {metric} "
        f"{value:.1f} % [{low:.1f}, {high:.1f}]",
        fontsize=10,
    )
    save(fig, path)


def _class_name(index: int, name: str) -> str:
    """The name; cut if too long, and numbered if it is not shown in full."""
    shown = drawable(" ".join(name.split()))
    if len(shown) > LONGEST_NAME:
        shown = f"{shown[: LONGEST_NAME - 4].rstrip()} ..."
    return shown if shown == name else f"{index}: {shown}"
