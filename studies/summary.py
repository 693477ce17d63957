"""The tables and plots that the study leads with: one line per system.

All kNN here is of the mean patch token, on the average over the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from studies import config as systems
from studies.finished import CONTROLS, NAMES, Study, cell, table
from xsmae.evaluation.rows import AVERAGE, Result

FEATURE = "mean"
FINALISTS = tuple(systems.LONG)
# Metric of a row of kNN across scales -> its name in tables.
MEANS = {"diagonal": "same scale", "off_diagonal": "other scale"}


def summary_table(study: Study) -> str:
    """Steps, arithmetic, kNN, kNN across scales, probe of each system and control."""
    header = ["", "seeds", "steps", "arithmetic"]
    for data in study.data:
        short = data.split("_")[0]
        header += [f"{short} kNN", f"{short} across scales", f"{short} probe"]
    lines = []
    for system in NAMES:
        runs = study.seeds(system)
        if not runs or system not in systems.A_STEP:
            continue
        steps = runs[0]["steps"]
        spent = steps * systems.A_STEP[system] / systems.ARITHMETIC
        digests = [run["encoder"] for run in runs]
        start = [NAMES[system], f"{len(runs)}", f"{steps}", f"{spent:.2f}"]
        lines.append([*start, *_cells(study, digests, FEATURE)])
    for kind, name in CONTROLS.items():
        cells = _cells(study, [study.control(kind)], kind)
        lines.append([name, "", "", "", *cells])
    return table(header, lines)


def _cells(study: Study, digests: Sequence[str], feature: str) -> list[str]:
    found = []
    for data in study.data:
        where = (data, digests)
        found += [
            cell(study.find("knn", *where, feature=feature, scale=AVERAGE)),
            cell(study.find("knn_cross_scale", *where, feature=feature)),
            cell(study.find("linear_probe", *where, feature=feature, scale=100.0)),
        ]
    return found


def parts_table(study: Study) -> str:
    """`scale_distill` and each change to one of its parts, at equal arithmetic."""
    header = ["change", "seeds", "steps"]
    for data in study.data:
        short = data.split("_")[0]
        header += [f"{short} kNN", f"{short} across scales", f"{short} probe"]
    lines = []
    for system in systems.SYSTEMS:
        runs = study.seeds(system)
        if not runs or not system.startswith("scale_distill") or system in FINALISTS:
            continue
        name = f"`{system.partition('-')[2]}`" if "-" in system else "none"
        digests = [run["encoder"] for run in runs]
        start = [name, f"{len(runs)}", f"{runs[0]['steps']}"]
        lines.append([*start, *_cells(study, digests, FEATURE)])
    return table(header, lines)


def curves(study: Study) -> dict[str, list[tuple[float, str]]]:
    """Long run -> its checkpoints: 1e12 operations spent, digest of the encoder."""
    found = {}
    for system in FINALISTS:
        for run in study.seeds(system)[:1]:
            a_step = systems.A_STEP[system.removesuffix("-long")] / 1e3
            digests = {**run.get("checkpoints", {}), run["steps"]: run["encoder"]}
            found[system] = [(int(n) * a_step, digests[n]) for n in digests]
    return found


def long_table(study: Study) -> str:
    """kNN of each long run at each scale, and the controls'."""
    header = ["", "steps"]
    for data in study.data:
        short = data.split("_")[0]
        header += [f"{short} {scale:g} %" for scale in study.scales]
        header += [f"{short} average", f"{short} across scales", f"{short} probe"]
    lines = []
    for system in FINALISTS:
        for run in study.seeds(system)[:1]:
            name = NAMES[system.removesuffix("-long")]
            cells = _long_cells(study, [run["encoder"]], FEATURE)
            lines.append([name, f"{run['steps']:,}", *cells])
    for kind, name in CONTROLS.items():
        lines.append([name, "", *_long_cells(study, [study.control(kind)], kind)])
    return table(header, lines)


def _long_cells(study: Study, digests: Sequence[str], feature: str) -> list[str]:
    found = []
    for at, data in enumerate(study.data):
        found += [
            _plain(study.find("knn", data, digests, feature=feature, scale=scale))
            for scale in study.scales
        ]
        found += _cells(study, digests, feature)[3 * at : 3 * at + 3]
    return found


def _plain(rows: Sequence[Result]) -> str:
    return f"{100 * rows[0].value:.1f}" if rows else "-"


def draw_curves(study: Study, path: Path) -> None:
    """Plots kNN of the long runs against the arithmetic that they have spent."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.2), dpi=110)
    axes = figure.subplots(1, len(study.data), squeeze=False)[0]
    for axis, data in zip(axes, study.data, strict=True):
        for system, points in curves(study).items():
            rows = [
                study.find("knn", data, [digest], feature=FEATURE, scale=AVERAGE)
                for _, digest in points
            ]
            axis.plot(
                [spent for spent, _ in points],
                [100 * np.mean([row.value for row in of_one]) for of_one in rows],
                marker=".",
                label=NAMES[system.removesuffix("-long")].replace("`", ""),
            )
        (row,) = study.find("knn", data, [study.control("statistics")], scale=AVERAGE)
        axis.axhline(100 * row.value, color="0.3", ls=":", label=CONTROLS["statistics"])
        axis.set_xlabel("arithmetic spent (TFLOP)")
        axis.set_ylabel("kNN accuracy, average over scales, %")
        axis.set_title(data)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    figure.savefig(path)
