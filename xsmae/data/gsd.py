"""Checks the ground sample distance of a record and of what an encoder gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xsmae.errors import UserError

GSD_HELP = "give it in metres per pixel with --config.data.gsd=..."
# Every crop is a little finer than its whole image, so whole training images must not
# count as outside.
GSD_MARGIN = 1.1


def outside_training(info: Mapping[str, Any], smallest: float, largest: float) -> bool:
    """True if GSDs are outside the range of training; False if that is unknown.

    info: an `encoder.json`, or another mapping with its `gsd_range`.
    """
    if not info.get("gsd_range"):
        return False
    low, high = info["gsd_range"]
    return smallest < low / GSD_MARGIN or largest > high * GSD_MARGIN


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
