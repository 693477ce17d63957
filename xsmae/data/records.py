"""The protocol of a source, its records, and the code that sources share.

A source is a sequence of `Record`s with a known length. Its constructor reads and
checks everything that needs no decoding (ids, labels, GSD, the split) and raises a
`UserError` for a mistake. `source[i]` raises a `BadImageError` if that record cannot be
used, and no other error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xsmae.bands import UNITS
from xsmae.data.picture import Picture

if TYPE_CHECKING:
    from jaxtyping import Int

    from xsmae.data.raster_views import RasterImage


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image: [height, width, bands], metres per pixel, label or None, id.

    image: of the source's `dtype`, uint8 or float32. A record from `Source.open` may
    hold an undecoded one. gsd: one number, or (y, x) for a raster. valid: bool [height,
    width], the pixels of a raster that have a value; None if all have.
    """

    image: np.ndarray | Picture | RasterImage
    gsd: float | tuple[float, float]
    label: int | None
    id: str
    valid: np.ndarray | None = None


class Source(Protocol):
    """What the pipeline and the evaluations need from a source; it must be picklable.

    To add a data set, write one class that extends `BaseSource` with `bands`,
    `class_names`, `labels`, `fingerprint`, `__len__`, `__getitem__` and `id`. Name it
    in `catalogue.SOURCES`. Its keyword arguments are the fields of `config.data`; list
    those without a default in `catalogue.REQUIRED`. `repr` must not contain a path or
    an address, because a resumed run compares it. A source of image files extends
    `files.FileSource`, which only needs a `Listing`.
    """

    @property
    def bands(self) -> tuple[str, ...]:
        """The names of the image's channels, in order."""

    @property
    def dtype(self) -> str:
        """`uint8`, numbers 0 to 255, or `float32`, values in `units`."""

    @property
    def units(self) -> str:
        """What the values are, in words."""

    @property
    def wavelengths(self) -> tuple[float | None, ...]:
        """Of each band in nm, None where it is unknown; () if all are."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the list of contents; storage paths do not count."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label; empty without labels."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)], known without decoding; None without labels."""

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [len(self)], numbers from 0 on: images of a group share a read.

        Training keeps a group together. None: no images share a read.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The decoded record; raises BadImageError if it cannot be used."""

    def id(self, index: int) -> str:
        """The record's id, without decoding; for messages."""

    def open(self, index: int) -> contextlib.AbstractContextManager[Record]:
        """A context with the record; an image read from a file is not yet decoded.

        Raises BadImageError like `self[index]`, here or when the picture is decoded.
        Decode the picture inside the context.
        """

    def path(self, index: int) -> pathlib.Path | None:
        """The record's own file on this machine; None if there is none."""

    def notes(self) -> list[str]:
        """Notes for the user before the source is used, one line each."""


class BaseSource:
    """The defaults of `Source`: 8-bit images, no files, no groups, no notes."""

    dtype = "uint8"
    units = UNITS
    wavelengths = ()
    groups = None

    def open(self, index: int) -> contextlib.AbstractContextManager[Record]:
        """A context with the decoded record."""
        return contextlib.nullcontext(self[index])

    def path(self, index: int) -> pathlib.Path | None:
        """None, since the record has no file of its own."""
        del index
        return None

    def notes(self) -> list[str]:
        """No notes."""
        return []


class OpenedSource(BaseSource):
    """A source whose `open` gives images that are not decoded yet.

    Its constructor sets `_fingerprint` and `_class_names`.
    """

    _fingerprint: str
    _class_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the list of contents."""
        return self._fingerprint

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label; empty without labels."""
        return self._class_names

    def __getitem__(self, index: int) -> Record:
        with self.open(index) as record:
            return decoded(record)


def decoded(record: Record) -> Record:
    """Returns the record with its image decoded; raises BadImageError."""
    if isinstance(record.image, np.ndarray):
        return record
    if isinstance(record.image, Picture):
        return dataclasses.replace(record, image=record.image.decode())
    image, valid = record.image.read()
    return dataclasses.replace(record, image=image, valid=valid)


def pixel_digest(image: np.ndarray) -> bytes:
    """A 16-byte digest of the pixels and the shape."""
    content = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    content.update(np.ascontiguousarray(image))
    return content.digest()


def sha256_of_text(text: str) -> str:
    # Python represents file names that are not UTF-8 with surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint(*parts: Iterable[object]) -> str:
    """Returns 16 hexadecimal digits of the text of all parts, in order."""
    lines = ("\t".join(map(str, part)) for part in parts)
    return sha256_of_text("\n".join(lines))[:16]


def number(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers labels in sorted order; returns int64 [len(values)] and class names."""
    numbers = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values]), tuple(map(str, numbers))


class Subset(BaseSource):
    """The images of a source at `positions`, in that order, as a source.

    `open` gives decoded records of pictures, because classifiers train on views of
    whole images. The views of a raster need to know which of its pixels have a value.
    """

    def __init__(self, source: Source, positions: Int[np.ndarray, " n"]):
        self._source, self._positions = source, positions
        self.labels = labels_of(source, positions)
        self.class_names = source.class_names
        self.dtype, self.units = source.dtype, source.units
        self.wavelengths = source.wavelengths

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands of the source."""
        return self._source.bands

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the source's fingerprint and the positions."""
        return fingerprint(
            (self._source.fingerprint,), *((int(i),) for i in self._positions)
        )

    def id(self, index: int) -> str:
        """The image's id in the source."""
        return self._source.id(int(self._positions[index]))

    def path(self, index: int) -> pathlib.Path | None:
        """The image's path in the source."""
        return self._source.path(int(self._positions[index]))

    def notes(self) -> list[str]:
        """The notes of the source."""
        return self._source.notes()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._positions[index])]

    def open(self, index: int) -> contextlib.AbstractContextManager[Record]:
        """A context with the record: decoded, or a raster's window."""
        if self.dtype == "uint8":
            return super().open(index)
        return self._source.open(int(self._positions[index]))

    def __repr__(self) -> str:
        return f"{len(self)} of {self._source!r}"


def labels_of(source: Source, index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The labels of the images at `index`."""
    return np.asarray(source.labels)[index]
