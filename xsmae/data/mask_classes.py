"""The classes of masks: `classes.json`, and from numbers or colours to classes.

    {
      "ignore_index": 255,
      "classes": [
        {"index": 0, "name": "building", "color": [60, 16, 152]},
        {"index": 1, "name": "road", "color": [110, 193, 228]}
      ],
      "ignored": [{"name": "unlabeled", "color": [155, 155, 155]}]
    }

`index` is the number in masks of one band; without it, the place in the list. Class i
is the i-th of the list. `color` is red, green and blue in masks of three bands; either
all classes have one or none. `ignore_index` (255 without it) and the colours of
`ignored` stand for pixels that do not count. Other keys say nothing to xsmae. A class
may also be its name alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.errors import UserError, printable

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped, UInt8

    Colour = tuple[int, int, int]

IGNORE = 255  # in the masks of a source, whatever the files have
MOST = 255  # classes
_LARGEST = 2**31 - 1  # number of a class in a file
_HELP = 'expected {"classes": [{"index": 0, "name": "building"}, ...]}'


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """names: of each class. numbers: what masks of one band hold for each class.

    ignore: the number of pixels that do not count. colours: what masks of three bands
    hold for each class; empty if there are none. ignored: the colours of pixels that do
    not count. where: the file, for messages.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignore: int = IGNORE
    colours: tuple[Colour, ...] = ()
    ignored: tuple[Colour, ...] = ()
    where: str = "the classes"

    def of(
        self,
        stored: Shaped[np.ndarray, "height width *bands"],
        where: str,
        *,
        valid: Bool[np.ndarray, "height width"] | None = None,
    ) -> UInt8[np.ndarray, "height width"]:
        """The class of each pixel, `IGNORE` where it does not count or is not valid.

        stored: one number a pixel, or red, green and blue in a last axis of 3. where:
        the mask, for messages. UserError for a number or a colour of no class.
        """
        if stored.ndim == 3:
            if not self.colours:
                raise UserError(
                    f"{where}: three bands, but {self.where} has no colours; expected "
                    'one band of class indices, or a "color" for each class'
                )
            known = [*self.colours, *self.ignored]
            keys = [_packed(*colour) for colour in known]
            found = _places(_packed(*np.moveaxis(stored.astype(np.int64), -1, 0)), keys)
        else:
            known = keys = [*self.numbers, self.ignore]
            found = _places(stored, keys)
        if valid is not None:
            found = np.where(valid, found, len(keys))
        unknown = found < 0
        if unknown.any():
            row, column = np.argwhere(unknown)[0].tolist()
            value = stored[row, column].tolist()
            what = f"colour {tuple(value)}" if stored.ndim == 3 else f"value {value}"
            raise UserError(
                f"{where}: {what} at row {row}, column {column} is no class "
                f"({int(unknown.sum())} pixels are of none); expected those of "
                f"{self.where}: {', '.join(map(str, known))}"
            )
        classes = np.full(len(keys) + 1, IGNORE, np.uint8)
        classes[: len(self.names)] = range(len(self.names))
        return classes[found]


def _packed(red: Any, green: Any, blue: Any) -> Any:
    return (red << 16) | (green << 8) | blue


def _places(stored: np.ndarray, keys: Sequence[int]) -> np.ndarray:
    """The place in `keys` of each number, -1 for none."""
    if stored.dtype == np.uint8:
        table = np.full(256, -1)
        for place, key in enumerate(keys):
            if key < 256:
                table[key] = place
        return table[stored]
    order = np.argsort(keys)
    ordered = np.asarray(keys)[order]
    near = np.searchsorted(ordered, stored).clip(max=len(keys) - 1)
    return np.where(ordered[near] == stored, order[near], -1)


def read_classes(path: str | os.PathLike) -> MaskClasses:
    """Read a `classes.json`; UserError if it is not as the module says."""
    where = printable(os.fspath(path))
    try:
        content = json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} cannot be read as JSON "
            f"({getattr(error, 'strerror', None) or error}); {_HELP}"
        ) from None
    found = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(found, list) or not 1 <= len(found) <= MOST:
        raise UserError(f"{where}: no list of 1 to {MOST} classes in it; {_HELP}")
    entries = [{"name": e} if isinstance(e, str) else e for e in found]
    for place, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: class {place} has no name; {_HELP}")
    ignore = _index(content.get("ignore_index", IGNORE), "ignore_index", where)
    names = tuple(entry["name"] for entry in entries)
    numbers = tuple(
        _index(entry.get("index", place), f"the index of {entry['name']!r}", where)
        for place, entry in enumerate(entries)
    )
    _all_different(names, "name", where)
    _all_different((*numbers, ignore), "index (ignore_index is one too)", where)
    colours = _colours(entries, where)
    missing = [n for n, colour in zip(names, colours, strict=True) if colour is None]
    if 0 < len(missing) < len(names):
        raise UserError(
            f"{where}: {len(missing)} of {len(names)} classes have no color, the first "
            f"{missing[0]!r}; give one to all classes or to none"
        )
    others = content.get("ignored", [])
    if not isinstance(others, list):
        raise UserError(f"{where}: ignored is no list; expected objects with a color")
    ignored = [colour for colour in _colours(others, where) if colour is not None]
    given = [colour for colour in colours if colour is not None]
    _all_different((*given, *ignored), "color", where)
    return MaskClasses(names, numbers, ignore, tuple(given), tuple(ignored), where)


def _index(value: Any, what: str, where: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 <= value <= _LARGEST:
        raise UserError(
            f"{where}: {what} is {value!r}; expected a whole number from 0 on"
        )
    return value


def _colours(entries: Sequence[Any], where: str) -> list[Colour | None]:
    found = []
    for entry in entries:
        colour = entry.get("color") if isinstance(entry, dict) else None
        if colour is None:
            found.append(None)
            continue
        good = isinstance(colour, list) and len(colour) == 3
        if not good or any(type(c) is not int or not 0 <= c <= 255 for c in colour):
            raise UserError(
                f"{where}: the color {colour!r}; expected [red, green, blue], each a "
                "whole number from 0 to 255"
            )
        found.append(tuple(colour))
    return found


def _all_different(values: Sequence[Any], what: str, where: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(
                f"{where}: {value!r} is the {what} of {values.count(value)} entries; "
                "expected each once"
            )
