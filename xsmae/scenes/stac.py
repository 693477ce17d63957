"""A STAC item for the embeddings of a scene, as plain JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xsmae.data.gdal import dataset_name, is_file
from xsmae.data.raster import Raster
from xsmae.scenes.chip_table import SceneFacts
from xsmae.scenes.outlines import box_of, outlines

VERSION = "1.1.0"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
MEDIA = {
    ".parquet": "application/vnd.apache.parquet",
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
}
NOT_OF_ITEM = ("stac_extensions", "software", "job", "model", "scene")


def item(
    raster: Raster,
    facts: SceneFacts,
    emb: Mapping[str, Any],
    asset: Path,
    *,
    encoder: str,
) -> dict[str, Any] | None:
    """The item that is written beside `asset`; None without a time, which STAC needs.

    emb: the footer of the asset. encoder: its folder; "" if it is not known.
    """
    if facts.time is None:
        return None
    whole = outlines(raster, np.array([(0, 0, *raster.shape)]))[0]
    gsd = raster.known_gsd()
    links = [{"rel": "emb:source-data", "href": _href(facts.source, asset.parent)}]
    if encoder:
        href = _href(encoder, asset.parent)
        links.append(
            {"rel": "emb:model", "href": href, "title": emb["model"]["digest"]}
        )
    found = {
        "type": "Feature",
        "stac_version": VERSION,
        "stac_extensions": [*emb["stac_extensions"], PROJECTION],
        "id": facts.name,
        "geometry": None if whole is None else whole.geojson(),
        "properties": {
            **_times(facts),
            "gsd": round(sum(gsd) / 2, 6),
            "proj:code": raster.crs if (raster.crs or "").startswith("EPSG:") else None,
            "proj:shape": list(raster.shape),
            "proj:transform": list(raster.transform[:6]),
            **{name: x for name, x in emb.items() if name not in NOT_OF_ITEM},
            "processing:software": dict([emb["software"].split(" ", 1)]),
        },
        "links": links,
        "assets": {
            "embeddings": {
                "href": f"./{asset.name}",
                "type": MEDIA[asset.suffix],
                "roles": ["data"],
            }
        },
    }
    if whole is not None:
        found["bbox"] = list(box_of([whole]))
    return found


def _times(facts: SceneFacts) -> dict[str, str | None]:
    """`datetime`, or null and the start and end of an interval."""
    start, end = (
        t and t.isoformat().replace("+00:00", "Z") for t in (facts.time, facts.end)
    )
    if end is None:
        return {"datetime": start}
    return {"datetime": None, "start_datetime": start, "end_datetime": end}


def _href(name: str, folder: Path) -> str:
    """A link from a folder: relative for a file of this machine, else the URL."""
    full = dataset_name(name)
    if is_file(full):
        return Path(os.path.relpath(full, folder.absolute())).as_posix()
    return full
