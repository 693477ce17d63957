"""How all rasters of a data set are read: the arguments of `open_raster`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from xsmae.data.geotiff_listing import Entry
from xsmae.data.raster import Raster, open_raster


@dataclasses.dataclass(frozen=True)
class RasterOptions:
    """See `open_raster`. What a table says of a raster counts before `bands`, `gsd`."""

    bands: Sequence[str] | None = None
    scale: float | Sequence[float] | None = None
    offset: float | Sequence[float] | None = None
    gsd: float | tuple[float, float] | None = None
    nodata_rule: str = "all"
    sensor: str | None = None

    def open(self, entry: Entry) -> Raster:
        """The opened raster; raises what `open_raster` raises."""
        options = {name: getattr(self, name) for name in OPTIONS}
        own = {"bands": entry.bands, "gsd": entry.gsd}
        own = {name: value for name, value in own.items() if value is not None}
        return open_raster(entry.path, **{**options, **own})

    def plain(self) -> dict[str, Any]:
        """Name -> value as JSON has it."""
        return {name: _plain(getattr(self, name)) for name in OPTIONS}


OPTIONS = tuple(field.name for field in dataclasses.fields(RasterOptions))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list, np.ndarray)) else value
