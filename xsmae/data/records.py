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

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xsmae.data.picture import Picture
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


if TYPE_CHECKING:
    from jaxtyping import Int


class Subset:
    """The images of a source at `positions`, in that order; a source itself."""

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

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._positions[index])]

    def __repr__(self) -> str:
        return f"{len(self)} of {self._source!r}"


def labels_of(source: Source, index: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The labels of the images at `index`."""
    return np.asarray(source.labels)[index]
