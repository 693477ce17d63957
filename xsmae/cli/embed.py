"""xsmae embed scenes/a.tif scenes/b.tif --encoder=runs/mine --out=embeddings

Cuts scenes of any size into chips and writes SCENE.parquet into the folder --out, with
one row per chip: its embedding, its footprint and where it is in the scene. The files
are GeoParquet, which DuckDB, GeoPandas and QGIS read.

manifest.json lists the files with their digests. A command that was stopped or killed
resumes: give it again. A scene that cannot be embedded is named with its reason, and
the next one follows; the exit status is then 3.

    xsmae embed images --gsd=0.5 --encoder=runs/quickstart --out=features.parquet

writes the features of a folder of plain images to one Parquet table with one row per
image: id (its path in the folder), label (its sub-folder, if any), gsd (the metres per
pixel that the encoder got) and embedding. pandas, DuckDB and pyarrow read both:

    table = pyarrow.parquet.read_table("features.parquet")
    x = numpy.stack(table["embedding"].to_numpy())

Instead of a folder, --data=configs/NAME.py --data.FIELD=VALUE embeds any data set.
Images that cannot be used are left out and named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from absl import flags

from xsmae.cli import embed_scenes
from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run, stoppable
from xsmae.cli.evaluation import define_data, split_parts
from xsmae.cli.images import open_images, say_written
from xsmae.errors import UserError
from xsmae.evaluation.embeddings import write_embeddings
from xsmae.evaluation.evaluate import subject_of
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.reading import MISSING_BANDS

OUT = "features.parquet"


def define_images(values: flags.FlagValues) -> None:
    """The flags that are for plain images only."""
    define_data(values)
    flags.DEFINE_string(
        "gsd_csv",
        None,
        "Instead of --gsd: a table with the columns path,gsd.",
        flag_values=values,
    )


def define_flags(values: flags.FlagValues) -> None:
    """The flags for both."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("encoder", None, "An encoder's folder, a workdir, RUN/checkpoints/STEP.")
    string(
        "out",
        None,
        f"The folder to write to, by default {embed_scenes.OUT}; of plain images the "
        f"file, by default {OUT}.",
    )
    flags.DEFINE_float(
        "gsd",
        None,
        "Metres per pixel of the folder's images, or of scenes whose CRS does not say "
        "it.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "size",
        None,
        "Pixels that the encoder gets: each chip, or the largest central square of "
        "each image, is resized to this size; its GSD changes accordingly. Default: "
        "--chip_size in pixels; else the size of training.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "pooling",
        None,
        FEATURES,
        "Class token or mean patch. Default: the encoder's own.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "missing_bands",
        "refuse",
        MISSING_BANDS,
        "What to do if the encoder reads bands that the images or scenes lack: fill "
        "them with their mean, or refuse.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        64,
        "How many images the encoder gets at a time. Chips are computed in groups of a "
        "fixed size; so many, rounded up to groups, are on their way at a time.",
        flag_values=values,
        lower_bound=1,
    )


def embed(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Embed scenes or images; returns the exit status."""
    fields, rest = split_parts(argv)
    values = flags.FlagValues()
    kinds = define_images, embed_scenes.define_flags
    for define in (*kinds, define_flags):
        define(values)
    given = parse_flags(values, rest, files=True)
    if not values.encoder and not values.merge:
        raise UserError(f"--encoder is missing: {example(__doc__)}")
    of_data = values.data is not None or any(fields.values())
    of_scenes = values.merge or any(not _is_folder(name) for name in given)
    of_scenes = of_scenes and not of_data
    other = flags.FlagValues()
    kinds[not of_scenes](other)
    for name in other:
        if values[name].present:
            wrong, right = ("plain images", "scenes")[:: 1 if of_scenes else -1]
            raise UserError(
                f"--{name} is for {wrong}, these are {right}: leave it out"
                + ("" if of_scenes else "; scenes are given as files, not as a folder")
            )
    if of_scenes:
        return embed_scenes.embed_scenes(given, values, should_stop)
    return _embed_images(given, fields, values, should_stop)


def _is_folder(name: str) -> bool:
    """True for a folder, and for what looks like one that does not exist."""
    path = Path(name)
    return path.is_dir() or not (path.suffix or path.exists())


def _embed_images(
    folders: list[str],
    fields: dict[str, list[str]],
    values: flags.FlagValues,
    should_stop: Callable[[], bool],
) -> int:
    """Embed, print which images were left out; returns the exit status."""
    source, config = open_images(folders, values, fields, doc=__doc__)
    encoder = subject_of(
        values.encoder,
        config=config,
        missing_bands=values.missing_bands,
        source=source,
    )
    out = values.out or OUT
    found = write_embeddings(
        encoder,
        source,
        out,
        size=values.size,
        pooling=values.pooling,
        batch_size=values.batch_size,
        should_stop=should_stop,
    )
    say_written(found, out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae embed`; returns the exit status."""
    return run(
        stoppable(embed, "stopped; the same command resumes, or of images starts anew"),
        argv,
        doc=__doc__,
        sections={
            "Flags": define_flags,
            "For scenes": embed_scenes.define_flags,
            "For plain images": define_images,
        },
        less_memory="lower --batch_size",
    )
