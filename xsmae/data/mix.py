"""Several sources as one: each part has its share of the samples.

An epoch is as long as it must be for every record to appear: the part with the most
records for its weight appears once, the others repeat. A part with n records and c
samples of an epoch gives each record c // n or c // n + 1 times, the extra ones evenly
spaced. So the shares are exact in every epoch, and the pipeline shuffles a mix like any
source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from xsmae.bands import known_or_empty
from xsmae.data.records import OpenedSource, Record, Source, fingerprint
from xsmae.errors import UserError


class Mix(OpenedSource):
    """The records of several sources, by weight. Nothing is warped or converted.

    All parts need the same bands, dtype and units. Ids start with the part's name. If
    all parts have labels, classes are joined by name; otherwise there are none.

    Args:
      sources: name -> source.
      weights: of each source, its share of the samples relative to the other weights.
      each_once: every record once, whatever the weights; for evaluations.

    Raises:
      UserError: a source that differs from the first one.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Sequence[float],
        *,
        each_once: bool = False,
    ):
        self._names, self._sources = tuple(sources), list(sources.values())
        for name, source in sources.items():
            _check_alike(self._names[0], self._sources[0], name, source)
        sizes = [len(source) for source in self._sources]
        self._counts = sizes if each_once else epoch_counts(sizes, weights)
        self._starts = np.cumsum([0, *self._counts])
        self._fingerprint = fingerprint(
            (type(self).__name__, each_once),
            *zip(
                self._names,
                self._counts,
                (source.fingerprint for source in self._sources),
                strict=True,
            ),
        )
        classes = [source.class_names for source in self._sources]
        joined = sorted(set().union(*classes)) if all(classes) else []
        self._class_names = tuple(joined)
        # Of each part: its own number of a class -> the number here.
        self._numbers = [
            np.array([joined.index(name) for name in names] if joined else [], int)
            for names in classes
        ]

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands of every part."""
        return self._sources[0].bands

    @property
    def dtype(self) -> str:
        """The dtype of every part."""
        return self._sources[0].dtype

    @property
    def units(self) -> str:
        """The units of every part."""
        return self._sources[0].units

    @property
    def wavelengths(self) -> tuple[float | None, ...]:
        """Those that all parts agree on."""
        known = [s.wavelengths or (None,) * len(self.bands) for s in self._sources]
        return known_or_empty(
            [
                band[0] if len({*band}) == 1 else None
                for band in zip(*known, strict=True)
            ]
        )

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)]; None if a part has no labels."""
        if not self._class_names:
            return None
        parts = zip(self._sources, self._counts, self._numbers, strict=True)
        return np.concatenate(
            [
                numbers[np.asarray(source.labels)[_cycled(np.arange(n), source, n)]]
                for source, n, numbers in parts
            ]
        )

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        """int64 [len(self)], those of the parts, others for each repetition."""
        if all(source.groups is None for source in self._sources):
            return None
        found, first = [], 0
        for source, count in zip(self._sources, self._counts, strict=True):
            at, size = np.arange(count), len(source)
            own = np.arange(size) if source.groups is None else source.groups
            groups = own[_cycled(at, source, count)] + at // size * (own.max() + 1)
            found.append(first + groups)
            first = found[-1].max() + 1
        # Numbers without gaps: the last repetition may lack some groups.
        return np.unique(np.concatenate(found), return_inverse=True)[1]

    def notes(self) -> list[str]:
        """Each part's share and length, and its own notes."""
        lines = []
        for name, source, count in zip(
            self._names, self._sources, self._counts, strict=True
        ):
            lines.append(
                f"{name}: {count / len(self):.1%} of an epoch of {len(self)} samples, "
                f"{len(source)} records {count / len(source):.3g} times each"
            )
            lines += [f"{name}: {note}" for note in source.notes()]
        if not self._class_names and any(s.class_names for s in self._sources):
            without = [
                name
                for name, source in zip(self._names, self._sources, strict=True)
                if not source.class_names
            ]
            lines.append(f"no labels are used: {', '.join(without)} has none")
        return lines

    def id(self, index: int) -> str:
        """The part's name, a slash, and the id in the part."""
        part, place = self._place(index)
        return f"{self._names[part]}/{self._sources[part].id(place)}"

    def path(self, index: int) -> pathlib.Path | None:
        """The path in the part."""
        part, place = self._place(index)
        return self._sources[part].path(place)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """A context with the record of the part; see `records.Source`."""
        part, place = self._place(index)
        with self._sources[part].open(place) as record:
            label = None
            if self._class_names:
                label = int(self._numbers[part][record.label])
            name = f"{self._names[part]}/{record.id}"
            yield dataclasses.replace(record, id=name, label=label)

    def _place(self, index: int) -> tuple[int, int]:
        """The part of an index, and the index in the part."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - int(self._starts[part])
        return part, int(_cycled(at, self._sources[part], self._counts[part]))

    def __repr__(self) -> str:
        # grain compares repr(source) on resume, so it must not contain a path.
        shares = ", ".join(
            f"{name} {count / len(self):.1%}"
            for name, count in zip(self._names, self._counts, strict=True)
        )
        return (
            f"{type(self).__name__}({len(self)} samples: {shares}, "
            f"fingerprint={self.fingerprint})"
        )


def epoch_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The samples of each part in the shortest epoch that has every record.

    Each count is the part's share of the sum, rounded; no count is below its size.
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
    total = sum(exact)
    pairs = list(zip(sizes, exact, strict=True))
    length = max(math.ceil(size * total / weight) for size, weight in pairs)
    ideal = [length * weight / total for weight in exact]
    counts = [math.floor(count) for count in ideal]
    # The largest remainders are rounded up, so that the sum is the length.
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - ideal[i], i))
    for i in order[: length - sum(counts)]:
        counts[i] += 1
    return counts


def _cycled(at: np.ndarray | int, source: Source, count: int) -> np.ndarray | int:
    """The records at positions 0 to `count` - 1 of a part's samples."""
    size = len(source)
    whole = count // size * size
    rest = np.maximum(at - whole, 0) * size // max(count - whole, 1)
    return np.where(np.asarray(at) < whole, at % size, rest)


def _check_alike(first: str, one: Source, name: str, other: Source) -> None:
    for what, shown, hint in (
        ("dtype", str, "mix 8-bit images with 8-bit images, rasters with rasters"),
        ("bands", ", ".join, f"choose the same with --config.data.parts.{name}.bands"),
        ("units", repr, f"give the sensor, scale and offset of {name}'s product"),
    ):
        ours, theirs = getattr(one, what), getattr(other, what)
        if ours != theirs:
            raise UserError(
                f"parts.{first} has the {what} {shown(ours)}, but parts.{name} has "
                f"{shown(theirs)}: {hint}"
            )
