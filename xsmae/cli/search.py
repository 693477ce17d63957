"""xsmae search --embeddings=embeddings --point=-99.16,47.02 --out=found

Finds the chips of xsmae embed SCENES whose embeddings are most like a query, by cosine
similarity. A query is a chip (--id), the chip at a place (--point), or an image
(--image, with the encoder of the embeddings). Each may be given several times:

    q = mean(queries) - 0.5 mean(--not)

of vectors of unit length. A chip that is a query finds itself first. The hits are
printed. The folder --out gets

    hits.csv, hits.geojson   places, scores and sources; footprints
    contact_sheet.png        the hits, read from their scenes, with scale bars
    map.html                 footprints and thumbnails; opens without a network

A scene that cannot be read any more leaves a grey tile with the reason.
"""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

from xsmae.cli.arguments import joined, parse_flags
from xsmae.cli.command import example, run
from xsmae.errors import UserError
from xsmae.scenes.hits import as_text
from xsmae.scenes.search import INDEXES, K, search

OUT = "found"
POINT = re.compile(r"\s*[-+\d.eE]+\s*,\s*[-+\d.eE]+\s*")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def several(name, text):
        flags.DEFINE_multi_string(name, [], text, flag_values=values)

    def number(name, default, text):
        flags.DEFINE_float(name, default, text, flag_values=values)

    string("embeddings", None, "The folder that xsmae embed SCENES wrote.")
    several("id", "The id of a chip.")
    several("point", "LONGITUDE,LATITUDE in degrees: the chip that has this place.")
    several("image", "An image or a raster: its middle, as large as a chip.")
    several(
        "not",
        "What hits should not be like: a place, the file of an image, or an id.",
    )
    string("encoder", None, "For images: the encoder of the embeddings.")
    flags.DEFINE_integer("k", K, "How many hits.", flag_values=values)
    flags.DEFINE_list(
        "bbox",
        None,
        "WEST,SOUTH,EAST,NORTH in degrees: only chips with a part in it. West above "
        "east is a box across the antimeridian.",
        flag_values=values,
    )
    number(
        "min_distance_m",
        0.0,
        "Metres between the centres of hits; of two near ones, the better one is a "
        "hit.",
    )
    flags.DEFINE_boolean(
        "exclude_query",
        False,
        "Chips that are queries are no hits.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "index",
        "exact",
        INDEXES,
        "usearch (extra search): an approximate index for tens of millions of chips, "
        "kept beside the tables; its measured recall is printed.",
        flag_values=values,
    )
    string("out", OUT, "The folder to write to.")
    number("gsd", None, "Metres per pixel of images, where no CRS says it.")
    flags.DEFINE_list(
        "bands",
        None,
        "Names of the images' bands, to choose some, or one name for each band.",
        flag_values=values,
    )
    string("sensor", None, "A known product: band names, scale and offset of images.")
    number("scale", None, "Of images: value = number * scale + offset.")
    number("offset", None, "See --scale.")


def find(argv: list[str]) -> int:
    """Search, print the hits and the files; returns the exit status."""
    values = flags.FlagValues()
    define_flags(values)
    for name in ("point", "bbox", "not"):  # a value may begin with a minus
        argv = joined(argv, name)
    parse_flags(values, argv)
    if not values.embeddings:
        raise UserError(f"--embeddings is missing: {example(__doc__)}")
    query = [
        *values.id,
        *(_numbers(text) for text in values.point),
        *map(Path, values.image),
    ]
    options = ("bands", "scale", "offset", "gsd", "sensor", "encoder", "bbox")
    written: list[str] = []
    hits = search(
        values.embeddings,
        query,
        unlike=[_guess(text) for text in values["not"].value],
        k=values.k,
        min_distance_m=values.min_distance_m,
        exclude_query=values.exclude_query,
        index=values.index,
        out=values.out,
        say=written.append,
        **{name: values[name].value for name in options},
    )
    print("\n".join([as_text(hits), *written]), flush=True)
    return 0


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _guess(text: str) -> str | tuple[str, ...] | Path:
    """A place, an image if there is such a file, else an id."""
    if POINT.fullmatch(text):
        return _numbers(text)
    path = Path(text)
    return path if path.is_file() else text


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae search`; returns the exit status."""
    return run(find, argv, doc=__doc__, sections={"Flags": define_flags})
