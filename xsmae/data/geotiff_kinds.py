"""The kinds of rasters in a folder: what a source of all of them would refuse, and why.

A source stops at the first raster that does not fit. This looks at all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from xsmae.data.geotiff_listing import Entry, list_rasters
from xsmae.data.raster_options import RasterOptions
from xsmae.errors import BadImageError, UserError, printable


@dataclasses.dataclass(frozen=True)
class Kind:
    """Rasters that are alike. bands: their names, if they can be used; else problem:
    why not. names: the rasters' ids."""

    bands: tuple[str, ...]
    problem: str
    names: tuple[str, ...]


def kinds_of_rasters(
    root: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Kind]:
    """The kinds, those that can be used first, the most frequent ones first.

    options: the fields of `RasterOptions`. Raises UserError if there are no rasters at
    all, and KeyboardInterrupt once `should_stop()` is true.
    """
    how, groups = RasterOptions(**options), collections.defaultdict(list)
    for entry in list_rasters(root)[0]:
        if should_stop():
            raise KeyboardInterrupt
        groups[_kind(entry, how)].append(entry.id)
    kinds = [Kind(*found, tuple(names)) for found, names in groups.items()]
    return sorted(kinds, key=lambda kind: (bool(kind.problem), -len(kind.names)))


def _kind(entry: Entry, how: RasterOptions) -> tuple[tuple[str, ...], str]:
    try:
        with how.open(entry) as raster:
            raster.known_gsd()
            return raster.bands, ""
    except (BadImageError, UserError) as error:
        return (), str(error).removeprefix(f"{printable(entry.path)}: ")
