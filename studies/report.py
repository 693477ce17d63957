"""Writes the tables and the plot of the head-to-head study.

`python -m studies.report` reads the committed rows in studies/results. It writes the
tables between the marks of docs/study.md, and the plot to docs/study_scales.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.figure
import numpy as np

from studies import config as systems
from studies import summary
from studies.finished import CONTROLS, FEATURES, NAMES, Study, cell, load, table
from studies.head_to_head import STUDIES
from xsmae.errors import UserError
from xsmae.evaluation.rows import AVERAGE

DOCS = STUDIES.parent / "docs"
# Name of a part of docs/study.md between `<!-- NAME -->` and `<!-- end of NAME -->`.
PARTS = {
    "summary": summary.summary_table,
    "tables": lambda study: tables(study),
}


def runs_table(study: Study) -> str:
    """The table of steps, images, minutes and losses of each system."""
    lines = []
    for system in _compared(study):
        runs = study.seeds(system)
        one = runs[0]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        numbers = (one[k] for k in ("steps", "batch_size", "images", "views"))
        minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in runs)
        loss = f"{one['first']['loss']:.2f} → {one['last']['loss']:.2f}"
        numbers = [f"{number:,}" for number in numbers]
        lines.append([NAMES[system], seeds, *numbers, minutes, loss])
    header = ["system", "seeds", "steps", "samples a step", "images seen"]
    return table([*header, "views seen", "minutes", "loss"], lines)


def comparison_table(study: Study, data: str) -> str:
    """The table of every system and control on one data set."""
    lines = []
    for system in _compared(study):
        digests = [run["encoder"] for run in study.seeds(system)]
        for feature in FEATURES:
            lines.append(_line(study, data, NAMES[system], digests, feature))
    for system in _compared(study):
        untrained = study.untrained(study.seeds(system)[0]["encoder"])
        if untrained is not None:
            name = f"untrained, as {NAMES[system]}"
            for feature in FEATURES:
                line = _line(study, data, name, [untrained], feature)
                # Equal architectures share one random encoder.
                if line[1:] not in [other[1:] for other in lines]:
                    lines.append(line)
    for kind, name in CONTROLS.items():
        lines.append(_line(study, data, name, [study.control(kind)], kind))
    header = ["", "feature", *(f"kNN {scale:g} %" for scale in study.scales)]
    return table([*header, "kNN average", "probe 100 %"], lines)


def _line(study, data, name, digests, feature) -> list[str]:
    cells = [
        cell(study.find("knn", data, digests, feature=feature, scale=scale))
        for scale in (*study.scales, AVERAGE)
    ]
    probe = study.find("linear_probe", data, digests, feature=feature, scale=100.0)
    return [name, FEATURES.get(feature, ""), *cells, cell(probe)]


def _columns(study: Study) -> dict[str, tuple[str, str, float, str]]:
    """The columns of the ablations: header -> task, data set, scale, feature."""
    columns = {}
    for data in study.data:
        for task, scale in (("knn", AVERAGE), ("linear_probe", 100.0)):
            for feature in FEATURES:
                short = {"knn": "kNN average", "linear_probe": "probe"}[task]
                header = f"{data.split('_')[0]} {short}, {feature}"
                columns[header] = (task, data, scale, feature)
    return columns


def ablation_table(study: Study) -> str:
    """`corrected` and each change to it, one seed: the value and the difference."""
    baseline = study.seeds("corrected")[:1]
    columns = _columns(study)
    header = ["change", *columns]

    def values(run) -> list[float]:
        return [
            100 * row.value
            for task, data, scale, feature in columns.values()
            for row in study.find(
                task, data, [run["encoder"]], scale=scale, feature=feature
            )
        ]

    lines = []
    base = values(baseline[0]) if baseline else []
    for system in systems.SYSTEMS:
        runs = [r for r in study.seeds(system) if baseline]
        runs = [r for r in runs if r["seed"] == baseline[0]["seed"]]
        if not runs or not system.startswith("corrected"):
            continue
        found = values(runs[0])
        if system == "corrected":
            lines.append(["none", *(f"{value:.1f}" for value in found)])
            continue
        pairs = zip(found, base, strict=True)
        name = f"`{system.removeprefix('corrected-')}`"
        lines.append([name, *(f"{v:.1f} ({v - b:+.1f})" for v, b in pairs)])
    return table(header, lines)


def contested_table(study: Study) -> str:
    """`corrected` and its changes with several seeds: mean ± standard deviation."""
    columns = _columns(study)
    whole = {run["seed"] for run in study.seeds("corrected")}
    lines = []
    for system in systems.SYSTEMS:
        runs = study.seeds(system)
        shared = whole & {run["seed"] for run in runs}
        if system.partition("-")[0] != "corrected" or len(shared) < 2:
            continue
        digests = [run["encoder"] for run in runs if run["seed"] in shared]
        cells = [
            cell(study.find(task, data, digests, scale=scale, feature=feature))
            for task, data, scale, feature in columns.values()
        ]
        name = f"`{system.partition('-')[2]}`" if "-" in system else "none"
        lines.append([name, ", ".join(map(str, sorted(shared))), *cells])
    return table(["change", "seeds", *columns], lines)


def _compared(study: Study) -> list[str]:
    return [system for system in NAMES if study.seeds(system)]


def tables(study: Study) -> str:
    """The whole tables, for the appendix of docs/study.md."""
    parts = ["### Runs\n", runs_table(study)]
    for data in study.data:
        parts += [f"### {data}\n", comparison_table(study, data)]
    parts += ["### `corrected`, one change at a time\n", ablation_table(study)]
    parts += ["### The changes with more seeds\n", contested_table(study)]
    return "\n".join(parts)


def replace_tables(document: str, study: Study) -> str:
    """Replaces the text between the marks of each part of `PARTS`."""
    for name, create in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if document.count(start) != 1 or document.count(end) != 1:
            raise UserError(
                f"docs/study.md: expected {start.strip()!r} once and {end.strip()!r} "
                "once"
            )
        before, _, rest = document.partition(start)
        after = rest.partition(end)[2]
        document = f"{before}{start}\n{create(study)}\n{end}{after}"
    return document


def draw(study: Study, path: Path) -> None:
    """Plots kNN accuracy of the mean patch against scale, as the mean of the seeds."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.2), dpi=110)
    axes = figure.subplots(1, len(study.data), squeeze=False)[0]
    for axis, data in zip(axes, study.data, strict=True):
        for index, system in enumerate(_compared(study)):
            digests = [run["encoder"] for run in study.seeds(system)]
            _curve(axis, study, data, digests, "mean", NAMES[system], f"C{index}")
        untrained = study.untrained(study.runs[0]["encoder"])
        if untrained is not None:
            _curve(axis, study, data, [untrained], "mean", "untrained", "0.6", "--")
        for (kind, name), style in zip(CONTROLS.items(), (":", "-."), strict=True):
            _curve(axis, study, data, [study.control(kind)], kind, name, "0.3", style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(study.scales, [f"{scale:g} %" for scale in study.scales])
        axis.set_xlabel("scale (100 % is 64 px)")
        axis.set_ylabel("kNN accuracy, %")
        axis.set_title(data)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [label.replace("`", "") for label in labels]
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path)


def _curve(axis, study, data, digests, feature, name, color, style="-") -> None:
    found = [
        [
            100 * row.value
            for row in study.find("knn", data, digests, feature=feature, scale=scale)
        ]
        for scale in study.scales
    ]
    axis.plot(
        study.scales,
        [np.mean(values) for values in found],
        style,
        color=color,
        marker="." if style == "-" else None,
        label=name,
    )
    low, high = ([f(values) for values in found] for f in (min, max))
    axis.fill_between(study.scales, low, high, color=color, alpha=0.15, linewidth=0)


def main() -> int:
    """Writes tables and plot; returns the exit status."""
    try:
        study = load(STUDIES / "results")
        page = DOCS / "study.md"
        page.write_text(replace_tables(page.read_text(), study))
        draw(study, DOCS / "study_scales.png")
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
