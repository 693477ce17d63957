"""xsmae embed images --gsd=0.5 --encoder=runs/quickstart --out=features.parquet

Writes the features of a folder of images to a Parquet table with one row per image: id
(its path in the folder), label (its sub-folder, if any), gsd (the metres per pixel that
the encoder got) and embedding. pandas, DuckDB and pyarrow read it:

    table = pyarrow.parquet.read_table("features.parquet")
    x = numpy.stack(table["embedding"].to_numpy())

Instead of a folder, --data=configs/NAME.py --data.FIELD=VALUE embeds any data set.
Images that cannot be used are left out and named.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run, stoppable
from xsmae.cli.evaluation import define_data, split_parts
from xsmae.cli.images import open_images, say_written
from xsmae.errors import UserError
from xsmae.evaluation.embeddings import write_embeddings
from xsmae.evaluation.evaluate import subject_of
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.reading import MISSING_BANDS


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_data(values)

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("encoder", None, "An encoder's folder, a workdir, RUN/checkpoints/STEP.")
    string("out", "features.parquet", "The file to write.")
    flags.DEFINE_float(
        "gsd", None, "Metres per pixel of the folder's images.", flag_values=values
    )
    string("gsd_csv", None, "Instead of --gsd: a table with the columns path,gsd.")
    flags.DEFINE_integer(
        "size",
        None,
        "Pixels. The largest central square of each image is resized to this size; its "
        "GSD changes accordingly. Default: the size of training.",
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
        "What to do if the encoder reads bands that the images lack: fill them with "
        "their mean, or refuse.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        64,
        "How many images the encoder gets at a time.",
        flag_values=values,
    )


def embed(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Embed, print which images were left out; returns the exit status."""
    fields, rest = split_parts(argv)
    values = flags.FlagValues()
    define_flags(values)
    folders = parse_flags(values, rest, files=True)
    if not values.encoder:
        raise UserError(f"--encoder is missing: {example(__doc__)}")
    source, config = open_images(folders, values, fields, doc=__doc__)
    encoder = subject_of(
        values.encoder,
        config=config,
        missing_bands=values.missing_bands,
        source=source,
    )
    found = write_embeddings(
        encoder,
        source,
        values.out,
        size=values.size,
        pooling=values.pooling,
        batch_size=values.batch_size,
        should_stop=should_stop,
    )
    say_written(found, values.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae embed`; returns the exit status."""
    return run(
        stoppable(embed, "stopped, nothing was written"),
        argv,
        doc=__doc__,
        sections={"Flags": define_flags},
        less_memory="lower --batch_size",
    )
