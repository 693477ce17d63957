"""A map of hits as one HTML file, which opens without a network."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xsmae.figures.hit_page import PAGE
from xsmae.process.files import atomic_write

if TYPE_CHECKING:
    from jaxtyping import UInt8

    from xsmae.scenes.hits import Hit
    from xsmae.scenes.thumbnails import Picture

QUALITY = 85  # of JPEG


def hit_map(
    path: str | os.PathLike, hits: Sequence[Hit], pictures: Sequence[Picture]
) -> None:
    """Draw footprints in longitude and latitude, coloured by score, with thumbnails.

    A degree of longitude is cos(latitude of the middle) degrees of latitude wide. Hits
    without a place on Earth are in the list alone.
    """
    content = {
        "turn": first_longitude([hit.centre[0] for hit in hits if hit.centre]),
        "hits": [_entry(*both) for both in zip(hits, pictures, strict=True)],
    }
    # In a script, only "<" could end it.
    told = json.dumps(content).replace("<", "\\u003c")
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(PAGE.replace("__DATA__", told), encoding="utf-8")


def first_longitude(longitudes: Sequence[float]) -> float:
    """Where the map begins: in the middle of the widest gap between places."""
    found = np.unique(np.asarray(longitudes, float))
    if not len(found):
        return -180.0
    gaps = np.diff(np.append(found, found[0] + 360))
    widest = int(gaps.argmax())
    begin = float(found[widest] + gaps[widest] / 2)
    return begin - 360 if begin > found[-1] else begin


def _entry(hit: Hit, picture: Picture) -> dict[str, Any]:
    rings = [] if hit.outline is None else hit.outline.rings
    return {
        "rank": hit.rank,
        "score": round(hit.score, 4),
        "id": hit.id,
        "date": hit.date,
        "source": hit.source,
        "window": [hit.row, hit.col, hit.height, hit.width],
        "centre": None if hit.centre is None else np.round(hit.centre, 7).tolist(),
        "rings": [np.round(ring, 7).tolist() for ring in rings],
        "image": None if picture.image is None else data_uri(picture.image),
        "reason": picture.reason,
    }


def data_uri(image: UInt8[np.ndarray, "height width 3"]) -> str:
    """A picture as a JPEG in a URI."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
