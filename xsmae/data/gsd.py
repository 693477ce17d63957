"""Checks the ground sample distance of a record."""

from __future__ import annotations

import math
from typing import Any

from xsmae.errors import UserError

GSD_HELP = "give it in metres per pixel with --config.data.gsd=..."


def check_gsd(value: Any, where: str) -> float:
    """Returns a GSD as a float in metres per pixel; UserError unless finite and > 0.

    `where` starts the message, e.g. "line 7 of tiles.csv".
    """
    try:
        gsd = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        gsd = math.nan
    if not (math.isfinite(gsd) and gsd > 0):
        raise UserError(
            f"{where}: the GSD is {value!r}, expected a number above 0 (decimal "
            f"point); {GSD_HELP}"
        )
    return gsd
