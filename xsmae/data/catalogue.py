"""The sources that a config can name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from xsmae.data.fmow import FmowCsvSource, FmowSource
from xsmae.data.folder import FolderSource
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.masks import MaskSource, Segmentation
from xsmae.data.mix import Mix
from xsmae.data.records import Source
from xsmae.data.synthetic.labelled import LandSource
from xsmae.data.synthetic.source import SyntheticSource
from xsmae.data.tables import CsvSource
from xsmae.data.tfds import TfdsSource
from xsmae.errors import UserError

PART_NAME = re.compile(r"[\w-]+")
SPLITS = ("all", "train", "test")  # that every part of a mix has


class MixSource(Mix):
    """Several sources as one, each with its share of the samples; see `mix.Mix`.

    Args:
      parts: name -> the fields of a source, with `source` and, if not 1, `weight`: the
        part's share of the samples, relative to the other weights.
      bands: of every part that can choose bands; None: as each part says.
      split: "all", "train" or "test" of every part; None: as each part says.
      test_fraction: of every part; None: as each part says.
      each_once: every record once, whatever the weights; for evaluations.

    Raises:
      UserError: a part that cannot be opened, or that differs from the first one.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        *,
        bands: Sequence[str] | None = None,
        split: str | None = None,
        test_fraction: float | None = None,
        each_once: bool = False,
    ):
        if not parts:
            raise UserError("parts is empty, expected a source for each name")
        if split not in (None, *SPLITS):
            raise UserError(
                f"split={split!r} of a mix, expected one of {', '.join(SPLITS)}: give "
                "lists of ids to the parts, in --config.data.parts.NAME.split"
            )
        parts = dict(sorted(parts.items()))  # the order of a config
        given = {"bands": bands, "split": split, "test_fraction": test_fraction}
        weights = [_weight(name, fields) for name, fields in parts.items()]
        sources = {name: _part(name, fields, given) for name, fields in parts.items()}
        super().__init__(sources, weights, each_once=each_once)


SOURCES = {
    "csv": CsvSource,
    "fmow": FmowSource,
    "fmow_csv": FmowCsvSource,
    "folder": FolderSource,
    "geotiff": GeotiffSource,
    "mix": MixSource,
    "synthetic": SyntheticSource,
    "tfds": TfdsSource,
}

# Sources with a mask for every image, for segmentation; not for the others.
MASK_SOURCES = {"masks": MaskSource, "synthetic_land": LandSource}

# Arguments without a default: the user must say where the images are.
REQUIRED = {
    "csv": ("csv_path",),
    "fmow": ("root",),
    "fmow_csv": ("csv_path",),
    "folder": ("root",),
    "geotiff": ("root",),
    "mix": ("parts",),
    "masks": ("root",),
    "synthetic": (),
    "synthetic_land": (),
    "tfds": ("name", "data_dir"),
}


def missing_arguments(data: Mapping[str, Any]) -> list[str]:
    """The required arguments of `config.data`, and of its parts, not set yet."""
    missing = [n for n in REQUIRED.get(data["source"], ()) if data.get(n) is None]
    for name, part in (data.get("parts") or {}).items():
        missing += [f"parts.{name}.{n}" for n in missing_arguments(part)]
    return missing


def named_source(data: Mapping[str, Any], sources: Mapping[str, Any] = SOURCES) -> str:
    """The name of the source in `config.data`; UserError if it is none of `sources`."""
    name = data.get("source")
    if name not in sources:
        raise UserError(
            f"data.source={name!r}, expected one of {', '.join(sorted(sources))}"
        )
    return name


def check_fields(data: Mapping[str, Any], sources: Mapping[str, Any] = SOURCES) -> None:
    """Raises UserError for a field that the source of `config.data` does not have."""
    name = named_source(data, sources)
    known = inspect.signature(sources[name]).parameters
    unknown = sorted(data.keys() - known.keys() - {"source"})
    if unknown:
        raise UserError(
            f"the source {name} has no field {', '.join(unknown)}, expected one of "
            f"{', '.join(known)}"
        )


def build_source(data: Mapping[str, Any]) -> Source:
    """Builds the source that `config.data` names, with its other fields as arguments.

    A field that is None keeps the class's default. Raises UserError for an unknown name
    or a missing location of the data.
    """
    if data["source"] in MASK_SOURCES:
        raise UserError(
            f"data.source={data['source']!r} has masks, which are for segmentation; "
            "expected a source of images, such as --config=folder with "
            "--config.data.root=FOLDER/images"
        )
    return _build(data, SOURCES)


def build_masks(data: Mapping[str, Any]) -> Segmentation:
    """Builds the source with masks that `data` names, like `build_source`."""
    if data["source"] in SOURCES:
        raise UserError(
            f"data.source={data['source']!r} has no masks, expected "
            f"{' or '.join(MASK_SOURCES)}, as in --data=segmentation"
        )
    return _build(data, MASK_SOURCES)


def _build(data: Mapping[str, Any], sources: Mapping[str, Any]) -> Any:
    arguments = {k: v for k, v in data.items() if v is not None}
    name = named_source(data, sources)
    del arguments["source"]
    missing = missing_arguments(data)
    if missing:
        raise UserError(
            f"{', '.join(f'data.{n}' for n in missing)} not set: say where the images "
            f"are with {' '.join(f'--config.data.{n}=...' for n in missing)}"
        )
    return sources[name](**arguments)


def open_source(
    data: str | Mapping[str, Any] | ml_collections.ConfigDict, **fields: Any
) -> Source | Segmentation:
    """Opens the source of a config, of its `data` fields, or by its name.

        open_source(config)
        open_source(config, split="test")
        open_source("folder", root="images", gsd=0.5)
        open_source("mix", parts={"a": {"source": "geotiff", "root": "scenes"}, ...})
        open_source("masks", root="labelled", gsd=0.5)

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
            f"of {', '.join(SOURCES | MASK_SOURCES)}"
        )
    found |= fields
    sources = SOURCES | MASK_SOURCES
    if found["source"] in sources:
        check_fields(found, sources)
    try:
        return _build(found, sources)
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", "")) from None


def _weight(name: str, fields: Mapping[str, Any]) -> float:
    weight = fields.get("weight")
    weight = 1.0 if weight is None else weight
    if not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise UserError(
            f"parts.{name}.weight={weight!r}, expected a number above 0: leave a part "
            "out that is not wanted"
        )
    return weight


def _part(name: str, fields: Mapping[str, Any], given: Mapping[str, Any]) -> Source:
    """The source of a part; `given` replaces the fields that it has."""
    fields = {key: value for key, value in fields.items() if key != "weight"}
    try:
        kind = named_source(fields)
        if not PART_NAME.fullmatch(name) or kind == "mix":
            raise UserError(
                f"source={kind!r}, expected a name of letters, digits, - and _, and a "
                "source that is no mix"
            )
        known = inspect.signature(SOURCES[kind]).parameters
        for key, value in given.items():
            if value is not None and key in known:
                fields[key] = value
        if given["split"] not in (None, "all") and "split" not in known:
            raise UserError(
                f"source={kind!r} has no splits, but split={given['split']!r}: remove "
                "it, or switch the kNN check off with --config.knn.every=-1"
            )
        check_fields(fields)
        return build_source(fields)
    except UserError as error:
        message = str(error).replace("config.data.", f"config.data.parts.{name}.")
        raise UserError(f"parts.{name}: {message}") from None
