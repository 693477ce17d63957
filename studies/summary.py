"""The table that the study leads with: one line per system.

All kNN here is of the mean patch token, on the average over the scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from studies import config as systems
from studies.finished import CONTROLS, NAMES, Study, cell, table
from xsmae.evaluation.rows import AVERAGE

FEATURE = "mean"


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
