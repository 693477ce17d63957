"""What a source is: records, the protocol, the published split, files under a root.

A source is a sequence of `Record`s of known length. Whatever can be known without
decoding (ids, labels, GSD, the split) is known, and checked, when it is made: a
mistake is a `UserError` there. A record that cannot be used is a `BadImageError` in
`source[i]`, and nothing else is.

The published split. `split="train"` and `split="test"` are the same on every machine
and for ever: within each class, the ids are ranked by the SHA-256 of their UTF-8 bytes
(read as hexadecimal text), and the first `round(test_fraction * n)` of the n are the
test split (Python's round: halves to even). Without labels all records are one class.
EuroSAT at 0.2: 21,600 / 5,400; RESISC45 at 0.2: 25,200 / 6,300; UC Merced at 0.1:
1,890 / 210. `split` may also be the path of a text file with one id a line. Labels and
class names are numbered before the split, hence the same in all.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from xsmae.data.images import BANDS
from xsmae.data.picture import Picture, open_picture
from xsmae.errors import UserError

GSD_HELP = "give it in metres per pixel with --config.data.gsd=..."


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image: uint8 [height, width, 3], metres per pixel, label or None, id.

    Of a record that `open_record` gives, the image may be undecoded, a `Picture`.
    """

    image: np.ndarray | Picture
    gsd: float
    label: int | None
    id: str


class Source(Protocol):
    """What the pipeline and the evaluations ask of a source; it must be picklable."""

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


def open_record(
    source: Source, index: int
) -> contextlib.AbstractContextManager[Record]:
    """A context with the record at `index`, undecoded if the source reads files.

    Those sources have `open(index)`, this context. BadImageError as `source[index]`, or
    when the picture is decoded, which is possible within the context alone.
    """
    if hasattr(source, "open"):
        return source.open(index)
    return contextlib.nullcontext(source[index])


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


def split_indices(
    ids: Sequence[str],
    labels: np.ndarray | None,
    split: str,
    test_fraction: float,
) -> np.ndarray:
    """Chooses the records of a split by the published rule (see the module).

    Args:
      ids: one per record.
      labels: int [len(ids)] or None.
      split: "all", "train", "test", or the path of a text file with one id a line.
      test_fraction: between 0 and 1, for "train" and "test".

    Returns:
      int64 [n], ascending.

    Raises:
      UserError: no such split or file, unknown or repeated ids, nothing left.
    """
    if split == "all":
        return np.arange(len(ids))
    if split not in ("train", "test"):
        return _listed(ids, split)
    if not 0 < test_fraction < 1:
        raise UserError(
            f"test_fraction is {test_fraction}, expected a number between 0 and 1"
        )
    members = collections.defaultdict(list)
    for index in range(len(ids)):
        members[None if labels is None else int(labels[index])].append(index)
    is_test = np.zeros(len(ids), bool)
    for indices in members.values():
        # The index breaks ties between equal ids.
        indices.sort(key=lambda index: (_sha256(ids[index]), index))
        is_test[indices[: round(test_fraction * len(indices))]] = True
    chosen = np.flatnonzero(is_test if split == "test" else ~is_test)
    if not len(chosen):
        raise UserError(
            f"split={split!r} is empty: test_fraction={test_fraction} of {len(ids)} "
            f"images in {len(members)} classes; change test_fraction"
        )
    return chosen


def _listed(ids: Sequence[str], path: str) -> np.ndarray:
    try:
        lines = pathlib.Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"split={path!r} is none of 'all', 'train', 'test' and cannot be read as "
            f"a text file of ids ({getattr(error, 'strerror', None) or error})"
        ) from None
    wanted = [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise UserError(f"the split list {path} is empty; write one id a line")
    repeated = len(wanted) - len(set(wanted))
    if repeated:
        first = collections.Counter(wanted).most_common(1)[0][0]
        raise UserError(
            f"the split list {path} repeats {repeated} ids, e.g. {first!r}; list each "
            "id once"
        )
    index_of = {name: index for index, name in enumerate(ids)}
    unknown = [name for name in wanted if name not in index_of]
    if unknown:
        raise UserError(
            f"the split list {path} has {len(unknown)} of {len(wanted)} ids that are "
            f"not in the data, the first {unknown[0]!r}; ids look like {ids[0]!r}"
        )
    return np.array(sorted(index_of[name] for name in wanted))


def _sha256(text: str) -> str:
    # File names that are not UTF-8 reach Python as surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint(*parts: Iterable[object]) -> str:
    """Returns 16 hexadecimal digits of the parts' text, in order."""
    lines = ("\t".join(map(str, part)) for part in parts)
    return _sha256("\n".join(lines))[:16]


def number(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers labels in sorted order: int64 [len(values)], and the class names."""
    numbers = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values]), tuple(map(str, numbers))


class Listing(NamedTuple):
    """Every image of a data set, before the split; one entry a record.

    `sizes` are bytes, of the image and of what lies beside it (-1: not there), so that
    a changed file changes the fingerprint. `gsds` is None where each is read later.
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


class FileSource:
    """Image files under one root; the base of the sources that read files.

    `options` are what else decides the pixels; they go into the fingerprint.
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
        self._fingerprint = fingerprint((kind, *options), names, *records)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over class, ids, sizes in bytes, labels and GSDs."""
        return self._fingerprint

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label; empty without labels."""
        return self._listing.class_names

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

    def __getitem__(self, index: int) -> Record:
        with self.open(index) as record:
            return decoded(record)

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """The record with its image undecoded, see `open_record`."""
        index = operator.index(index)
        gsd, crop = self._gsd_and_crop(index)
        limits = {"min_side": self._min_side, "max_pixels": self._max_pixels}
        with open_picture(self.path(index), **limits, **crop) as picture:
            label = None if self.labels is None else int(self.labels[index])
            yield Record(picture, gsd, label, self.id(index))

    def _gsd_and_crop(self, index: int) -> tuple[float, dict[str, Any]]:
        """Metres per pixel, and the `box` and `context` of `open_picture`, if any."""
        return float(self._listing.gsds[index]), {}

    def __repr__(self) -> str:
        # grain compares repr(source) on resume: no path, no address.
        return (
            f"{type(self).__name__}({len(self)} images, fingerprint={self.fingerprint})"
        )


def check_folder(root: str | os.PathLike) -> pathlib.Path:
    """Returns the folder as an absolute path; UserError if it is none."""
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected a folder of images")
    return path


def file_size(path: str | os.PathLike) -> int:
    """Returns a file's size in bytes, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
