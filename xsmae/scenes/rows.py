"""The loop over the chips of a scene: reading, encoding, rows that are finished.

Chips and patches share it. What a row of vectors is, a `Layout` says.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xsmae.errors import UserError
from xsmae.scenes.chips import ChipReader, Panel, panels
from xsmae.scenes.encoding import Groups, ahead_of

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    # Rows of `Strips` by the names of its files.
    Stored = Mapping[str, UInt8[np.ndarray, "rows ..."]]

EVERY = 5.0  # seconds between progress lines
READERS = min(os.cpu_count() or 1, 4)  # threads


@dataclasses.dataclass(frozen=True)
class Rows:
    """Finished rows of the grid of chips.

    rows: which. vectors: of their chips, [rows, columns, width], 0 for chips that are
    left out; or of the patches that they own, NaN without a value. valid: the valid
    part of each chip, [rows, columns]; None for patches.
    """

    rows: range
    vectors: Float[np.ndarray, "rows columns width"]
    valid: Float[np.ndarray, "rows columns"] | None


class Layout(Protocol):
    """Where the vectors of a scene's chips belong.

    step: rows of the grid that are finished together; groups of chips end with them.
    panel: rows and columns of chips that are read together; the rows divide `step`.
    shapes: of a stored row, for `Strips`.
    """

    reader: ChipReader
    step: int

    @property
    def panel(self) -> tuple[int, int]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
        """Chips, and the valid part of each, or of each of its patches."""

    def kept(self, valid: np.ndarray) -> bool:
        """True if a chip has enough valid pixels to be encoded."""

    def empty(self, rows: range) -> Rows:
        """Rows without a vector yet."""

    def put(
        self, rows: Rows, place: tuple[int, int], valid: Any, vector: np.ndarray | None
    ) -> None:
        """Add a chip by its row and column; vector: None if it is left out."""

    def stored(self, rows: Rows) -> Stored:
        """Finished rows as the bytes that `Strips` keeps."""

    def stored_row(self, row: int) -> int:
        """The first stored row of a row of the grid."""


class Compute(Protocol):
    """Computes the vectors of scenes: in this process, or on others.

    size: chips of a group.
    """

    size: int

    def stored(
        self,
        layout: Layout,
        job: str,
        rows: range,
        *,
        progress: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[tuple[range, Stored]]:
        """Finished rows of the grid, in order.

        job: of the scene. progress: is called with the number of finished chips of the
        grid. Raises KeyboardInterrupt once `should_stop()` is true.
        """


class Here:
    """Computes in this process."""

    def __init__(self, groups: Groups):
        self.groups, self.size = groups, groups.size

    def stored(
        self, layout: Layout, job: str, rows: range, **calls: Any
    ) -> Iterator[tuple[range, Stored]]:
        """See `Compute`."""
        for found in encoded(layout, self.groups, rows=rows, **calls):
            yield found.rows, layout.stored(found)


def encoded(
    layout: Layout,
    groups: Groups,
    *,
    rows: range,
    progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Rows]:
    """The vectors of some rows of the grid, `layout.step` rows at a time.

    rows: begin at a multiple of `layout.step`, and end at one or with the grid. So the
    groups are the same, whoever computes which rows. Reading, encoding and the caller's
    work overlap. Once `should_stop()` is true, the chips on their way are finished; if
    rows are missing, it raises KeyboardInterrupt.
    """
    reader, step = layout.reader, layout.step
    columns = reader.grid.shape[1]
    parts: dict[int, Rows] = {}

    def chips(pool):
        last = None
        todo = panels(reader.grid, layout.panel, rows)
        for panel, (images, valid) in ahead_of(todo, layout.read, pool, READERS):
            if should_stop():
                return
            part = panel.rows[0] // step
            if part != last:
                if last is not None:
                    yield (last,), None, None
                first = part * step
                end = min(first + step, rows.stop)
                parts[part], last = layout.empty(range(first, end)), part
            gsd = reader.gsd(reader.grid.places(*np.array(panel.chips).T))
            for place, image, own, good in zip(
                panel.chips, images, gsd, valid, strict=True
            ):
                if layout.kept(good):
                    yield (part, place, good), image, own
                else:
                    layout.put(parts[part], place, good, None)
        if last is not None:
            yield (last,), None, None

    end = rows.start
    with ThreadPoolExecutor(READERS) as pool:
        for keys, vectors in groups.run(chips(pool)):
            if len(keys[0]) == 1:
                found = parts.pop(keys[0][0])
                end = found.rows.stop
                yield found
                continue
            row, column = keys[-1][1]
            if not np.isfinite(vectors).all():
                raise UserError(
                    "the encoder gives vectors that are not finite up to row "
                    f"{reader.grid.tops[row]} of the scene: give another encoder"
                )
            for (part, place, good), vector in zip(keys, vectors, strict=True):
                layout.put(parts[part], place, good, vector)
            progress(row * columns + column + 1)
    if end < rows.stop:
        raise KeyboardInterrupt


def as_bytes(numbers: Float[np.ndarray, "rows columns *width"]) -> np.ndarray:
    """float32 as the bytes that `Strips` keeps."""
    return numbers.reshape(*numbers.shape[:2], -1).view(np.uint8)


class Progress:
    """Says every few seconds how many chips are done, and the time left."""

    def __init__(self, total: int, start: int, say: Callable[[str], None]):
        self.total, self.start, self.say = total, start, say
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < EVERY or done >= self.total:
            return
        self.last = now
        rate = (done - self.start) / (now - self.begin)
        left = round((self.total - done) / max(rate, 1e-9))
        self.say(
            f"chip {done} of {self.total}, {rate:.0f} a second, {left // 3600}:"
            f"{left // 60 % 60:02}:{left % 60:02} left"
        )
