"""The sources that a config can name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import ml_collections

from xsmae.data.fmow import FmowCsvSource, FmowSource
from xsmae.data.folder import FolderSource
from xsmae.data.records import Source
from xsmae.data.synthetic.source import SyntheticSource
from xsmae.data.tables import CsvSource
from xsmae.data.tfds import TfdsSource
from xsmae.errors import UserError

SOURCES = {
    "csv": CsvSource,
    "fmow": FmowSource,
    "fmow_csv": FmowCsvSource,
    "folder": FolderSource,
    "synthetic": SyntheticSource,
    "tfds": TfdsSource,
}

# The arguments that must be given: there is no default for where the images are.
REQUIRED = {
    "csv": ("csv_path",),
    "fmow": ("root",),
    "fmow_csv": ("csv_path",),
    "folder": ("root",),
    "synthetic": (),
    "tfds": ("name", "data_dir"),
}


def missing_arguments(data: Mapping[str, Any]) -> list[str]:
    """The required arguments of `config.data` that are not set yet."""
    return [n for n in REQUIRED.get(data["source"], ()) if data.get(n) is None]


def build_source(data: Mapping[str, Any]) -> Source:
    """The source of `config.data`: its class by the name `source`, its arguments.

    Arguments that are None are left to the class's default. Raises UserError where the
    name is not known or where the data lie is not given.
    """
    arguments = {k: v for k, v in data.items() if v is not None}
    name = arguments.pop("source")
    if name not in SOURCES:
        raise UserError(
            f"data.source={name!r}, expected one of {', '.join(sorted(SOURCES))}"
        )
    missing = missing_arguments(data)
    if missing:
        raise UserError(
            f"{', '.join(f'data.{n}' for n in missing)} not set: say where the images "
            f"are with {' '.join(f'--config.data.{n}=...' for n in missing)}"
        )
    return SOURCES[name](**arguments)


def open_source(
    data: str | Mapping[str, Any] | ml_collections.ConfigDict, **fields: Any
) -> Source:
    """The source of a config, of its fields `data`, or by its name in SOURCES.

        open_source(config)
        open_source(config, split="test")
        open_source("folder", root="images", gsd=0.5)

    fields: set instead of those of `data`. Raises UserError where the source or a field
    is not known, or the images are not what they should be.
    """
    if isinstance(data, str):
        found = {"source": data}
    else:
        found = dict(data.get("data", data).items())
    if "source" not in found:
        raise UserError(
            f"{data!r} names no source, expected a config, its fields `data`, or one "
            f"of {', '.join(SOURCES)}"
        )
    found |= fields
    if found["source"] in SOURCES:
        known = inspect.signature(SOURCES[found["source"]]).parameters
        unknown = sorted(found.keys() - known.keys() - {"source"})
        if unknown:
            raise UserError(
                f"the source {found['source']} has no {', '.join(unknown)}, expected "
                f"of {', '.join(known)}"
            )
    try:
        return build_source(found)
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", "")) from None
