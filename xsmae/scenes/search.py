"""`xsmae.search`: the chips of a folder of embeddings that are most alike."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.errors import UserError
from xsmae.scenes.approximate import Index, open_index
from xsmae.scenes.exact import nearest
from xsmae.scenes.hits import Hit, as_hit, read_chips
from xsmae.scenes.places import Box, Places, far_from
from xsmae.scenes.queries import check_encoder, combine, find_queries
from xsmae.scenes.search_files import write_files
from xsmae.scenes.stored import Stored
from xsmae.weights.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from xsmae.scenes.queries import Query

K = 12
MOST = 1000  # hits
INDEXES = ("exact", "usearch")
LIMIT = 10_000  # candidates of an index
MORE, SPARE = 4, 64  # candidates for each hit, and more, where near ones are left out


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """Which chips may be hits.

    box: None: anywhere. apart: metres between the centres of two hits. without: rows.
    taken: longitude and latitude of hits that are there already.
    """

    box: Box | None
    apart: float
    without: Sequence[int]
    taken: Float[np.ndarray, "hits 2"]

    def __call__(self, start: int, places: Places) -> Bool[np.ndarray, " n"]:
        """True for chips that may be hits; the first has the row `start`."""
        found = ~np.isin(np.arange(start, start + len(places)), self.without)
        if self.box is not None:
            found &= places.in_box(self.box)
        if self.apart:
            found &= far_from(places.centres(), self.taken, self.apart)
        return found

    @property
    def all(self) -> bool:
        """True if no place needs to be known."""
        return self.box is None and not self.apart


def best_rows(
    stored: Stored,
    query: Float[np.ndarray, " width"],
    k: int,
    *,
    box: Box | None = None,
    apart: float = 0.0,
    without: Sequence[int] = (),
) -> list[tuple[int, float]]:
    """The rows of the `k` best hits, best first, and their cosines.

    Of two chips less than `apart` metres from each other, only the better one is a hit.
    """
    wanted = Wanted(box, apart, tuple(without), np.zeros((0, 2)))
    found: list[tuple[int, float]] = []
    while len(found) < k:
        many = MORE * k + SPARE if apart else k + len(wanted.without)
        many = min(many, stored.count)
        chunks = stored.chunks(None if wanted.all else wanted)
        (scores,), (rows,) = nearest(chunks, query[None], many)
        kept = (rows >= 0) & ~np.isin(rows, wanted.without)
        rows, scores = rows[kept], scores[kept]
        if not apart:
            return list(zip(rows[:k].tolist(), scores[:k].tolist(), strict=True))
        if not len(rows):
            break
        # All others are worse than these: the next ones are found among chips that
        # are far enough from the hits.
        centres = _places(stored, rows).centres()
        taken = wanted.taken
        for row, score, centre in zip(rows, scores, centres, strict=True):
            if len(found) < k and far_from(centre[None], taken, apart)[0]:
                found.append((int(row), float(score)))
                taken = np.vstack([taken, centre])
        wanted = dataclasses.replace(wanted, taken=taken)
    return found


def best_of_index(
    stored: Stored,
    index: Index,
    query: Float[np.ndarray, " width"],
    k: int,
    *,
    box: Box | None,
    apart: float,
    without: Sequence[int],
) -> list[tuple[int, float]] | None:
    """As `best_rows`, from an index; None if too few of `LIMIT` candidates are hits."""
    wanted = Wanted(box, 0.0, tuple(without), np.zeros((0, 2)))
    many = k + len(wanted.without) if box is None and not apart else MORE * k + SPARE
    while True:
        many = min(many, stored.count)
        scores, rows = index.nearest(query, many)
        places = _places(stored, rows)
        kept = ~np.isin(rows, wanted.without)
        if box is not None:
            kept &= places.in_box(box)
        found: list[tuple[int, float]] = []
        taken, centres = np.zeros((0, 2)), places.centres()
        for i in np.flatnonzero(kept):
            centre = centres[i : i + 1]
            if len(found) < k and (not apart or far_from(centre, taken, apart)[0]):
                found.append((int(rows[i]), float(scores[i])))
                taken = np.vstack([taken, centre])
        if len(found) == k or many == stored.count:
            return found
        if many >= LIMIT:
            return None
        many *= 4


def _places(stored: Stored, rows: Sequence[int]) -> Places:
    return Places.of(stored.rows(rows, ["bbox", "geometry"]))


def search(
    embeddings: str | os.PathLike,
    query: Query | Sequence[Query],
    *,
    unlike: Query | Sequence[Query] = (),
    encoder: Encoder | str | os.PathLike | None = None,
    k: int = K,
    bbox: Sequence[float] | None = None,
    min_distance_m: float = 0.0,
    exclude_query: bool = False,
    index: str = "exact",
    bands: Sequence[str] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    gsd: float | None = None,
    sensor: str | None = None,
    out: str | os.PathLike | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Hit]:
    """The chips that are most like a query, best first, by cosine similarity.

        hits = xsmae.search("embeddings", (-98.1, 47.0), k=20, out="found")
        print(hits[0].id, hits[0].score, hits[0].centre)

    The search is exact by default, and its memory that of a part of the tables. A chip
    that is the query finds itself first. Several queries are averaged: q = mean(wanted)
    - 0.5 mean(unlike), of vectors of unit length (Rocchio).

    Args:
      embeddings: the folder that `xsmae embed SCENES` wrote.
      query: the id of a chip, a place (longitude, latitude) that is in a chip, an image
        (a `pathlib.Path`, or from `open_raster`), or a list of them. Of an image, the
        middle is read, as large as a chip.
      unlike: what hits should not be like, in the same ways.
      encoder: for images, from `load_encoder`, or its folder.
      k: hits. bbox: west, south, east, north in degrees; west above east is a box
        across the antimeridian. A hit has a part in it.
      min_distance_m: metres between the centres of hits; of two near ones, the better
        one is a hit.
      exclude_query: chips that are queries are no hits.
      index: `exact`, or `usearch` (extra `search`) for tens of millions of chips:
        builds an index beside the tables, or reads it, and says its measured recall.
      bands, scale, offset, gsd, sensor: of images, as in `open_raster`.
      out: the folder for hits.csv, hits.geojson, contact_sheet.png and map.html; None
        writes nothing.
      say: called with a line for each written file, and for the index.

    Raises:
      UserError: a query is not found, the tables are of another encoder or of several,
        or arguments do not fit.
      BadImageError: an image cannot be read.
    """
    queries, others = _listed(query), _listed(unlike)
    options = {
        "bands": bands, "scale": scale, "offset": offset, "gsd": gsd, "sensor": sensor,
    }  # fmt: skip
    _check(queries, others, k, min_distance_m, encoder, options)
    if index not in INDEXES:
        raise UserError(f"index={index!r}, expected one of {', '.join(INDEXES)}")
    stored = Stored.open(embeddings)
    box = None if bbox is None else Box.of(bbox)
    if encoder is not None:
        loaded = isinstance(encoder, Encoder)
        encoder = encoder if loaded else load_encoder(encoder, attention="auto")
        check_encoder(stored, encoder)
    found = find_queries(stored, [*queries, *others], encoder, options)
    wanted, unwanted = found[: len(queries)], found[len(queries) :]
    own = [f.chip.number for f in found if f.chip.number is not None]
    if exclude_query and not own:
        raise UserError(
            "exclude_query leaves out chips that are queries, but all queries are "
            "images: leave it out"
        )
    vector = combine(wanted, unwanted)
    limits = {
        "box": box, "apart": min_distance_m, "without": own if exclude_query else (),
    }  # fmt: skip
    rows = None
    if index == "usearch":
        graph = open_index(stored, say)
        say(f"usearch: finds {graph.recall:.1%} of the 10 nearest of a chip")
        rows = best_of_index(stored, graph, vector, k, **limits)
        if rows is None:
            say(f"too few of the {LIMIT} nearest chips are hits: searches exactly")
    if rows is None:
        rows = best_rows(stored, vector, k, **limits)
    chips = read_chips(stored, [row for row, _ in rows])
    hits = [
        as_hit(chip, rank, score)
        for rank, (chip, (_, score)) in enumerate(zip(chips, rows, strict=True), 1)
    ]
    if out is not None:
        asked = [(f.chip, i < len(queries)) for i, f in enumerate(found)]
        write_files(Path(out), hits, asked, say)
    return hits


def _listed(query) -> list:
    """One query or several, as a list."""
    if isinstance(query, list):
        return query
    return [] if query == () else [query]


def _check(queries, others, k, apart, encoder, options) -> None:
    """Raise UserError for arguments that do not fit."""
    if not queries:
        raise UserError(
            "nothing to look for: give --id, --point or --image; --not alone is too "
            "little"
        )
    if not 1 <= k <= MOST:
        raise UserError(f"k={k}, expected 1 to {MOST}")
    if not 0 <= apart < np.inf:
        raise UserError(f"min_distance_m={apart:g}, expected metres, 0 or more")
    images = [q for q in [*queries, *others] if not isinstance(q, str | tuple)]
    unused = [name for name, value in options.items() if value is not None]
    if not images and (unused or encoder is not None):
        raise UserError(
            f"{(unused or ['encoder'])[0]} is for images, but no query is an image: "
            "leave it out"
        )
