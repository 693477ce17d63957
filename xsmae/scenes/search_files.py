"""The files of a search: tables, a contact sheet, a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from xsmae.errors import UserError, printable
from xsmae.figures.hit_map import hit_map
from xsmae.figures.hits import MOST, Tile, hit_sheet
from xsmae.scenes.hits import Chip, Hit, write_csv, write_geojson
from xsmae.scenes.thumbnails import Picture, read_pictures

SHOWN = 34  # characters of an id


def write_files(
    folder: Path,
    hits: Sequence[Hit],
    asked: Sequence[tuple[Chip, bool]],
    say: Callable[[str], None],
) -> None:
    """Write hits.csv, hits.geojson, contact_sheet.png and map.html into a folder.

    asked: the queries, and if hits should be like them. say: called with each file.
    """
    queries = asked[: MOST // 2]
    pictures = read_pictures([*(chip for chip, _ in queries), *hits])
    of_queries, of_hits = pictures[: len(queries)], pictures[len(queries) :]
    tiles = [
        _tile("query" if like else "not", "", chip, picture, query=True)
        for (chip, like), picture in zip(queries, of_queries, strict=True)
    ]
    tiles += [
        _tile(f"{hit.rank}", f"   {hit.score:.4f}", hit, picture)
        for hit, picture in zip(hits, of_hits, strict=True)
    ]
    title = f"{len(hits)} hits, by cosine similarity"
    writers = {
        "hits.csv": lambda path: write_csv(path, hits),
        "hits.geojson": lambda path: write_geojson(path, hits),
        "contact_sheet.png": lambda path: hit_sheet(path, tiles, title),
        "map.html": lambda path: hit_map(path, hits, of_hits),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(folder / name)
            say(printable(str(folder / name)))
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(folder))}: {error.strerror or error}; "
            "give another --out"
        ) from None


def _tile(
    name: str, score: str, chip: Chip, picture: Picture, *, query: bool = False
) -> Tile:
    date = f"\n{chip.date}" if chip.date else ""
    return Tile(
        title=f"{name}{score}\n{chip.id[-SHOWN:]}{date}",
        image=picture.image,
        reason=picture.reason,
        ground=chip.ground,
        query=query,
    )
