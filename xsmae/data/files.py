"""Sources that read image files below one root."""

import contextlib
import operator
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xsmae.bands import BANDS
from xsmae.data.picture import open_picture
from xsmae.data.records import OpenedSource, Record, fingerprint
from xsmae.errors import UserError


class Listing(NamedTuple):
    """Every image of a data set before the split, one entry per record.

    `sizes` are the bytes of the image and its sidecar files (-1: missing), so that a
    changed file changes the fingerprint. `gsds` is None if each GSD is read later.
    """

    ids: list[str]
    sizes: list[tuple[int, ...]]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    gsds: np.ndarray | None

    def take(self, indices: np.ndarray) -> "Listing":
        """Returns the records at `indices`; the class names stay."""
        return Listing(
            [self.ids[i] for i in indices],
            [self.sizes[i] for i in indices],
            None if self.labels is None else self.labels[indices],
            self.class_names,
            None if self.gsds is None else self.gsds[indices],
        )


class FileSource(OpenedSource):
    """Image files under one root; the base class of sources that read files.

    `options` are other settings that change the pixels. They are part of the
    fingerprint.
    """

    bands = BANDS

    def __init__(
        self,
        root: pathlib.Path,
        listing: Listing,
        *,
        min_side: int,
        max_pixels: int,
        options: Sequence[object] = (),
    ):
        self._root = root
        self._listing = listing
        self._min_side = min_side
        self._max_pixels = max_pixels
        ids, sizes, labels, names, gsds = listing
        records = zip(
            ids,
            sizes,
            [None] * len(ids) if labels is None else labels,
            [None] * len(ids) if gsds is None else gsds,
            strict=True,
        )
        kind = type(self).__name__
        # Of the class, ids, sizes in bytes, labels and GSDs.
        self._fingerprint = fingerprint((kind, *options), names, *records)
        self._class_names = names

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)]; None without labels."""
        return self._listing.labels

    def id(self, index: int) -> str:
        """The path relative to the root, with forward slashes."""
        return self._listing.ids[index]

    def path(self, index: int) -> pathlib.Path:
        """The record's file on this machine."""
        return self._root / self._listing.ids[index]

    def __len__(self) -> int:
        return len(self._listing.ids)

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """A context with the record, its image undecoded; see `records.Source`."""
        index = operator.index(index)
        gsd, crop = self._gsd_and_crop(index)
        limits = {"min_side": self._min_side, "max_pixels": self._max_pixels}
        with open_picture(self.path(index), **limits, **crop) as picture:
            label = None if self.labels is None else int(self.labels[index])
            yield Record(picture, gsd, label, self.id(index))

    def _gsd_and_crop(self, index: int) -> tuple[float, dict[str, Any]]:
        """The GSD in metres per pixel, and `box` and `context` for `open_picture`."""
        return float(self._listing.gsds[index]), {}

    def __repr__(self) -> str:
        # grain compares repr(source) on resume, so it must not contain a path.
        return (
            f"{type(self).__name__}({len(self)} images, fingerprint={self.fingerprint})"
        )


def check_folder(root: str | os.PathLike) -> pathlib.Path:
    """Returns the folder as an absolute path; UserError if it is not a folder."""
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected a folder of images")
    return path


def file_size(path: str | os.PathLike) -> int:
    """Returns a file's size in bytes, -1 if it does not exist."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
