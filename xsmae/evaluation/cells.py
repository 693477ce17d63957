"""Values in tables of results, marked at GSDs that an encoder was not trained at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from xsmae.data.gsd import outside_training
from xsmae.evaluation.details import Line, named, percent
from xsmae.evaluation.rows import Result

OUTSIDE = "*"


def cell(row: Result | None) -> str:
    """The value in percent and its interval, and a mark: `80.6 [79.5, 81.6]*`."""
    if row is None:
        return "-"
    return percent(row.value, row.low, row.high) + OUTSIDE * is_outside(row)


def is_outside(row: Result) -> bool:
    """True if the encoder got a GSD outside its range of training, if that is known."""
    told = np.ravel(row.gsd_told) if row.gsd_told else ()
    return any(outside_training(row.encoder, gsd, gsd) for gsd in told)


def explain_marks(lines: Iterable[Line]) -> list[str]:
    """What the mark means, one line per encoder that has one."""
    ranges = {
        name: row.encoder["gsd_range"] for name, row in named(lines) if is_outside(row)
    }
    return [
        f"{OUTSIDE}: the GSD given is outside {low:.3g} to {high:.3g} m, the range of "
        f"the training of {name}"
        for name, (low, high) in ranges.items()
    ]
