"""The labelled images of an evaluation: disjoint training and test parts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from xsmae.data.catalogue import build_source
from xsmae.data.records import Source, fingerprint
from xsmae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import UInt8

# One part: a source, or the `config.data` that describes one.
Data = Source | Mapping[str, Any] | ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Parts:
    """The training and test parts, and their description for result rows.

    name: the data's name. class_names: the classes of both parts.
    """

    name: str
    train: Source
    test: Source

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    def describe(self) -> dict[str, Any]:
        """Names, counts and digests, for `Protocol.data`.

        `fingerprint` is the source's own (ids, sizes in bytes, labels, GSDs). `split`
        is a digest of the ids in their order. Rasters have `bands`, `dtype` and `units`
        too; without these the images are 8-bit RGB.
        """
        found: dict[str, Any] = {"name": self.name, "classes": len(self.class_names)}
        if self.train.dtype != "uint8":
            found |= {
                "bands": list(self.train.bands),
                "dtype": self.train.dtype,
                "units": self.train.units,
            }
        for part in ("train", "test"):
            source = getattr(self, part)
            found[part] = {
                "images": len(source),
                "fingerprint": source.fingerprint,
                "split": fingerprint((source.id(i),) for i in range(len(source))),
            }
        return found


def open_parts(name: str, train: Data, test: Data) -> Parts:
    """Open both parts and check them against each other.

    Raises UserError if they have no labels, different classes, other bands or units, an
    image in common, or test images of a class without training images.
    """
    parts = Parts(name, _build("train", train), _build("test", test))
    kinds = [
        f"{source.dtype} values of {', '.join(source.bands)} ({source.units})"
        for source in (parts.train, parts.test)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"the training part of {name} has {kinds[0]}, its test part {kinds[1]}: "
            "give bands, sensor, scale and offset for both parts, with --data.FIELD"
        )
    if len(parts.train.class_names) < 2 or len(parts.test.class_names) < 2:
        hint = (
            ""
            if parts.train.dtype == "uint8"
            else (", and name it: --data.labels=folder or --data.labels=table")
        )
        raise UserError(
            f"{name} has {len(parts.train.class_names)} class(es) in its training part "
            f"and {len(parts.test.class_names)} in its test part, expected 2 or more: "
            f"put the images into a folder per class, or add a label column{hint}"
        )
    if parts.train.class_names != parts.test.class_names:
        odd = sorted(set(parts.train.class_names) ^ set(parts.test.class_names))
        what = f"only one has {', '.join(odd)}" if odd else "the order differs"
        raise UserError(
            f"the training and test parts of {name} have different classes ({what}): "
            "give two splits of one data set with --train.split and --test.split"
        )
    shown = set(map(int, parts.train.labels))
    never = sorted(set(map(int, parts.test.labels)) - shown)
    if never:
        names = ", ".join(parts.class_names[label] for label in never[:5])
        names += ", ..." if len(never) > 5 else ""
        count = int(np.isin(parts.test.labels, never).sum())
        raise UserError(
            f"{count} of the {len(parts.test)} test images of {name} have classes "
            f"without a training image ({names}): give a --train.split with all "
            "classes, or a --test.split without these"
        )
    if len(shown) < 2:
        raise UserError(
            f"all training images of {name} have one class "
            f"({parts.class_names[shown.pop()]}), expected 2 or more: give another "
            "--train.split"
        )
    common = places_of(parts.train) & places_of(parts.test)
    if common:
        raise UserError(
            f"{len(common)} images are in both the training and the test part of "
            f"{name}, e.g. {min(common)!r}: give splits without common images with "
            "--train.split and --test.split"
        )
    return parts


def name_of(*data: Data) -> str:
    """The data's name: its TFDS name, or the name of its folder or table.

    The names of a mix's parts are joined by `+`. The first of `data` with such a name
    decides. If none has one, the result is the kind of the first.
    """
    for one in data:
        fields = fields_of(one)
        if fields is None:
            continue
        if fields.get("name"):
            return fields["name"]
        if fields.get("parts"):
            return "+".join(map(name_of, fields["parts"].values()))
        place = fields.get("root") or fields.get("csv_path")
        if place:
            return Path(place).absolute().stem
    fields = fields_of(data[0])
    return type(data[0]).__name__ if fields is None else fields["source"]


def fields_of(data: Data) -> Mapping[str, Any] | None:
    """The fields of a `config.data`, None for a source."""
    if isinstance(data, ml_collections.ConfigDict):
        return data.to_dict()
    return data if isinstance(data, Mapping) else None


def _build(part: str, data: Data) -> Source:
    fields = fields_of(data)
    if fields is None:
        return data
    try:
        return build_source(fields)
    except UserError as error:
        message = str(error).replace("--config.data.", f"--{part}.")
        raise UserError(f"the {part} part: {message}") from None


def places_of(source: Source) -> set[str]:
    """What identifies each image: its real path, or its id if it is not a file."""
    paths = (source.path(i) for i in range(len(source)))
    return {
        source.id(i) if path is None else os.path.realpath(path)
        for i, path in enumerate(paths)
    }


def identical_images(
    train: UInt8[np.ndarray, "n 16"], test: UInt8[np.ndarray, "m 16"]
) -> list[tuple[int, int]]:
    """Pairs (test row, training row) of images with equal pixel digests.

    Each test image appears once, with the first training image that equals it.
    """
    first: dict[bytes, int] = {}
    for row, digest in enumerate(train):
        first.setdefault(digest.tobytes(), row)
    found = ((row, first.get(digest.tobytes())) for row, digest in enumerate(test))
    return [(row, other) for row, other in found if other is not None]
