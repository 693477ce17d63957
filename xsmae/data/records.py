"""What a source is: records, the protocol, and what its implementations share.

A source is a sequence of `Record`s of known length. Whatever can be known without
decoding (ids, labels, GSD, the split) is known, and checked, when it is made: a
mistake is a `UserError` there. A record that cannot be used is a `BadImageError` in
`source[i]`, and nothing else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xsmae.data.picture import Picture
from xsmae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int

GSD_HELP = "give it in metres per pixel with --config.data.gsd=..."


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image: uint8 [height, width, 3], metres per pixel, label or None, id.

    Of a record that `Source.open` gives, the image may be undecoded, a `Picture`.
    """

    image: np.ndarray | Picture
    gsd: float
    label: int | None
    id: str


class Source(Protocol):
    """What the pipeline and the evaluations ask of a source; it must be picklable.

    To add a data set, write one class that extends `BaseSource` with `bands`,
    `class_names`, `labels`, `fingerprint`, `__len__`, `__getitem__` and `id`, and give
    it a name in `catalogue.SOURCES`; its keyword arguments are the fields of
    `config.data`, those without a default are listed in `catalogue.REQUIRED`. `repr`
    must name no path or address, since a resumed run compares it. A source of image
    files extends `files.FileSource`, which needs a `Listing` and has all the rest.
    """

    @property
    def bands(self) -> tuple[str, ...]:
        """The names of the image's channels, in order."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the content list, wherever it is stored."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label; empty without labels."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)], known without decoding; None without labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadImageError where the record cannot be used."""

    def id(self, index: int) -> str:
        """The record's id, without decoding; for messages."""

    def open(self, index: int) -> contextlib.AbstractContextManager[Record]:
        """A context with the record, its image undecoded if it is read from a file.

        Raises BadImageError as `self[index]`, or when the picture is decoded, which is
        possible within the context alone.
        """

    def path(self, index: int) -> pathlib.Path | None:
        """The record's own file on this machine; None if it has none."""

    def notes(self) -> list[str]:
        """What a user should know before the source is used, a line each."""


class BaseSource:
    """The part of `Source` that has defaults: no files, no notes."""

    def open(self, index: int) -> contextlib.AbstractContextManager[Record]:
        """A context with the decoded record."""
        return contextlib.nullcontext(self[index])

    def path(self, index: int) -> pathlib.Path | None:
        """None: the record has no file of its own."""
        del index
        return None

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []


def decoded(record: Record) -> Record:
    """The record of an undecoded one; raises BadImageError."""
    return dataclasses.replace(record, image=record.image.decode())


def pixel_digest(image: np.ndarray) -> bytes:
    """16 bytes that images have in common when their pixels are the same."""
    content = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    content.update(np.ascontiguousarray(image))
    return content.digest()


def check_gsd(value: Any, where: str) -> float:
    """Returns a GSD as a float, metres per pixel; UserError unless finite and > 0.

    `where` begins the message, e.g. "line 7 of tiles.csv".
    """
    try:
        gsd = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        gsd = math.nan
    if not (math.isfinite(gsd) and gsd > 0):
        raise UserError(
            f"{where}: the GSD is {value!r}, expected a number above 0 (decimal "
            f"point); {GSD_HELP}"
        )
    return gsd


def sha256_of_text(text: str) -> str:
    # File names that are not UTF-8 reach Python as surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint(*parts: Iterable[object]) -> str:
    """Returns 16 hexadecimal digits of the parts' text, in order."""
    lines = ("\t".join(map(str, part)) for part in parts)
    return sha256_of_text("\n".join(lines))[:16]


def number(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers labels in sorted order: int64 [len(values)], and the class names."""
    numbers = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values]), tuple(map(str, numbers))


class Subset(BaseSource):
    """The images of a source at `positions`, in that order; a source itself.

    `open` gives decoded records: classifiers train on views of whole images.
    """

    def __init__(self, source: Source, positions: Int[np.ndarray, " n"]):
        self._source, self._positions = source, positions
        self.labels = labels_of(source, positions)
        self.class_names = source.class_names

    @property
    def bands(self) -> tuple[str, ...]:
        """Those of the source."""
        return self._source.bands

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, as `Source` has them."""
        return fingerprint(
            (self._source.fingerprint,), *((int(i),) for i in self._positions)
        )

    def id(self, index: int) -> str:
        """That of the source."""
        return self._source.id(int(self._positions[index]))

    def path(self, index: int) -> pathlib.Path | None:
        """That of the source."""
        return self._source.path(int(self._positions[index]))

    def notes(self) -> list[str]:
        """Those of the source."""
        return self._source.notes()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._positions[index])]

    def __repr__(self) -> str:
        return f"{len(self)} of {self._source!r}"


def labels_of(source: Source, index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The labels of the images at `index`."""
    return np.asarray(source.labels)[index]
