"""The sources that a config can name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import ml_collections

from xsmae.data.fmow import FmowCsvSource, FmowSource
from xsmae.data.folder import FolderSource
from xsmae.data.geotiff_source import GeotiffSource
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
    "geotiff": GeotiffSource,
    "synthetic": SyntheticSource,
    "tfds": TfdsSource,
}

# Arguments without a default: the user must say where the images are.
REQUIRED = {
    "csv": ("csv_path",),
    "fmow": ("root",),
    "fmow_csv": ("csv_path",),
    "folder": ("root",),
    "geotiff": ("root",),
    "synthetic": (),
    "tfds": ("name", "data_dir"),
}


def missing_arguments(data: Mapping[str, Any]) -> list[str]:
    """The required arguments of `config.data` that are not set yet."""
    return [n for n in REQUIRED.get(data["source"], ()) if data.get(n) is None]


def build_source(data: Mapping[str, Any]) -> Source:
    """Builds the source that `config.data` names, with its other fields as arguments.

    A field that is None keeps the class's default. Raises UserError for an unknown name
    or a missing location of the data.
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
    """Opens the source of a config, of its `data` fields, or by its name in SOURCES.

        open_source(config)
        open_source(config, split="test")
        open_source("folder", root="images", gsd=0.5)

    fields: replace the fields of `data`. Raises UserError for an unknown source or
    field, or if the images are not as described.
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
                f"the source {found['source']} has no field {', '.join(unknown)}, "
                f"expected one of {', '.join(known)}"
            )
    try:
        return build_source(found)
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", "")) from None
