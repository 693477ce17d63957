"""Checks numbers against ranges, with one message for all fields."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from xsmae.errors import UserError

# Limits for "above 0", "finite" and "below 1".
SMALL, LARGE, BELOW_1 = 1e-8, sys.float_info.max, math.nextafter(1, 0)

Ranges = Mapping[str, tuple[float, float]]


def check_numbers(values: Mapping[str, Any], ranges: Ranges, prefix: str = "") -> None:
    """Raises UserError for the first value outside its range.

    ranges: the smallest and largest number of a field; for a tuple they limit each
    number. Fields that are None or missing in `values` are not checked.
    """
    for name, (low, high) in ranges.items():
        found = values.get(name)
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if value is not None and not _within(value, low, high):
                raise UserError(
                    f"{prefix}{name}={found}, expected {expected_number(low, high)}"
                )


def _within(value: object, low: float, high: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high


def expected_number(low: float, high: float) -> str:
    """A range in words."""
    if (low, high) == (-LARGE, LARGE):
        return "a finite number"
    start = "above 0" if low == SMALL else f"{low} or more"
    if high == LARGE:
        return start
    end = "below 1" if high == BELOW_1 else f"at most {high}"
    return f"{start} and {end}"
