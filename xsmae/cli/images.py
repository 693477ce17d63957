"""Shared by the commands that write a table of the images of a folder or a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags

from xsmae.cli.evaluation import parts_of
from xsmae.data.catalogue import build_source
from xsmae.data.records import Source
from xsmae.errors import UserError, printable
from xsmae.evaluation.image_tables import Written

SHOWN = 20  # unusable images; the metadata of a Parquet file names all


def open_images(
    folders: Sequence[str],
    values: flags.FlagValues,
    fields: Mapping[str, list[str]],
    *,
    doc: str,
) -> tuple[Source, ml_collections.ConfigDict | None]:
    """The images of a folder, or of --data; and the config of --data.

    values: has --data, --gsd and --gsd_csv. fields: of `evaluation.split_parts`. doc:
    begins with an example.
    """
    config = None
    if values.data is not None or any(fields.values()):
        config = parts_of(values, fields, doc=doc)
    if len(folders) + (config is not None) != 1:
        raise UserError(
            f"{len(folders)} folders{' and --data' if config else ''} given, expected "
            "one folder, or --data=configs/NAME.py"
        )
    if config is None:
        given = {"root": folders[0], "gsd": values.gsd, "gsd_csv": values.gsd_csv}
        data, flag = {"source": "folder", **given}, "--"
    else:
        for name in ("gsd", "gsd_csv"):
            if values[name].present:
                raise UserError(f"--{name} is for a folder: give --data.{name}")
        data, flag = config.data.to_dict(), "--data."
    try:
        return build_source(data), config
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", flag)) from None


def say_written(found: Written, out: str, *, shown: int | None = SHOWN) -> None:
    """Print which images were left out, and how many the file has.

    shown: how many are named; None names all.
    """
    names = list(found.unusable.items())
    for name, reason in names[:shown]:
        print(printable(f"left out: {name}: {reason}"))
    if shown is not None and len(names) > shown:
        print(f"and {len(names) - shown} more, listed in the metadata of {out}")
    left_out = f", {len(names)} left out" if names else ""
    print(f"{out}: {found.images} images{left_out}", flush=True)
