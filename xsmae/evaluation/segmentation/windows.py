"""Scores of every pixel of images of any size, from overlapping windows.

The memory is that of one strip of rows, whatever the height of an image is: a strip is
handed out as soon as no later window reaches it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

# From windows [n, crop, crop, bands] and their GSDs [n, 2] to [n, crop, crop, classes].
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Readable:
    """An image to read by windows.

    gsd: metres per pixel (y, x). read(top, left, height, width) -> [height, width,
    bands], for windows inside the image. gsd_at: the GSD of such a window, where it
    differs within the image. start: rows above it are not wanted.
    """

    height: int
    width: int
    gsd: tuple[float, float]
    read: Callable[[int, int, int, int], Shaped[np.ndarray, "height width bands"]]
    gsd_at: Callable[[int, int, int, int], tuple[float, float]] | None = None
    start: int = 0

    @classmethod
    def of(
        cls,
        image: Shaped[np.ndarray, "height width bands"],
        gsd: tuple[float, float],
    ) -> Readable:
        """An image in memory."""

        def read(top, left, height, width):
            return image[top : top + height, left : left + width]

        return cls(*image.shape[:2], gsd, read)


@dataclasses.dataclass(frozen=True)
class Strip:
    """Finished rows of an image, full width.

    image: the image's place in the sequence. top: the first row. scores: [rows, width,
    classes] float32.
    """

    image: int
    top: int
    scores: Float[np.ndarray, "rows width classes"]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` pixels start on an axis; no two are the same.

    The last one is shifted back so that it ends with the axis. An axis shorter than the
    crop has one window.
    """
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def window_weights(crop: int, overlap: int) -> Float[np.ndarray, " crop"]:
    """The weight of each pixel of a window on an axis.

    It rises linearly over the overlap at both ends, so that windows blend without a
    step. Without overlap all weights are equal.
    """
    place = np.arange(crop)
    rise = np.minimum(np.minimum(place + 1, crop - place), overlap + 1)
    return (rise / rise.max()).astype(np.float32)


def segment(
    images: Iterable[Readable],
    predict: Predict,
    *,
    crop: int,
    overlap: int,
    batch_size: int,
) -> Iterator[Strip]:
    """The scores of all pixels: the weighted mean of the windows that cover each.

    overlap: pixels that neighbouring windows share, at least. Images come in order, and
    so do the strips of each. `predict` gets up to `batch_size` windows, of several
    images if they are small. An image smaller than the crop is padded at the bottom and
    at the right with its last row and column; those scores are cut off.

    If the first image has a `start` where a strip begins, the strips from there are the
    same, bit for bit: the windows that reach them are computed in the same batches.
    """
    if not 0 <= overlap < crop:
        raise ValueError(f"overlap={overlap}, expected 0 or more and below crop={crop}")
    weights, stride = window_weights(crop, overlap), crop - overlap
    windows = _windows(images, crop, stride, batch_size)
    canvas = None
    while batch := list(itertools.islice(windows, batch_size)):
        values = np.stack([padded(window.read(crop), crop) for window in batch])
        gsd = np.array([window.gsd(crop) for window in batch], np.float32)
        scores = np.asarray(predict(values, gsd), np.float32)
        for window, found in zip(batch, scores, strict=True):
            if canvas is not None and canvas.index != window.index:
                yield canvas.finish(canvas.image.height)
                canvas = None
            if canvas is None:
                canvas = _Canvas(window, weights, stride, found.shape[-1])
            if window.top > canvas.top:
                strip = canvas.finish(window.top)
                if strip.top >= window.image.start:
                    yield strip
            canvas.add(window, found)
    if canvas is not None:
        yield canvas.finish(canvas.image.height)


@dataclasses.dataclass(frozen=True)
class _Window:
    index: int
    image: Readable
    top: int
    left: int

    def place(self, crop: int) -> tuple[int, int, int, int]:
        sides = min(crop, self.image.height), min(crop, self.image.width)
        return self.top, self.left, *sides

    def read(self, crop: int) -> np.ndarray:
        return self.image.read(*self.place(crop))

    def gsd(self, crop: int) -> tuple[float, float]:
        if self.image.gsd_at is None:
            return self.image.gsd
        return self.image.gsd_at(*self.place(crop))


def _windows(
    images: Iterable[Readable], crop: int, stride: int, batch_size: int
) -> Iterator[_Window]:
    for index, image in enumerate(images):
        tops = window_starts(image.height, crop, stride)
        lefts = window_starts(image.width, crop, stride)
        above = sum(top + crop <= image.start for top in tops) * len(lefts)
        first = above - above % batch_size  # whole batches, so that they stay the same
        for place in range(first, len(tops) * len(lefts)):
            row, column = divmod(place, len(lefts))
            yield _Window(index, image, tops[row], lefts[column])


def padded(values: np.ndarray, crop: int) -> np.ndarray:
    """A window of the full size: the last row and column are repeated."""
    down, across = (crop - side for side in values.shape[:2])
    if not down and not across:
        return values
    return np.pad(values, [(0, down), (0, across), (0, 0)], "edge")


class _Canvas:
    """The weighted sums of the rows of an image that are not finished."""

    def __init__(
        self,
        first: _Window,
        weights: Float[np.ndarray, " crop"],
        stride: int,
        classes: int,
    ):
        self.index, self.image, self.top = first.index, first.image, first.top
        self._weights = weights
        height, width = self.image.height, self.image.width
        self._sums = np.zeros((min(len(weights), height), width, classes), np.float32)
        # Windows form a grid, so the sum of their weights is a product of two axes.
        self._down, self._across = (
            _sum_of_weights(side, weights, stride) for side in (height, width)
        )

    def add(self, window: _Window, scores: np.ndarray) -> None:
        """Add the scores of a window that starts in the canvas's first row."""
        columns = min(len(self._weights), self.image.width)
        rows = len(self._sums)
        weights = np.outer(self._weights[:rows], self._weights[:columns])[..., None]
        part = self._sums[:, window.left : window.left + columns]
        part += weights * scores[:rows, :columns]

    def finish(self, stop: int) -> Strip:
        """The rows up to `stop`; the canvas then starts there."""
        rows = stop - self.top
        divisor = np.outer(self._down[self.top : stop], self._across)
        strip = Strip(self.index, self.top, self._sums[:rows] / divisor[..., None])
        self._sums[:-rows] = self._sums[rows:]
        self._sums[-rows:] = 0
        self.top = stop
        return strip


def _sum_of_weights(length: int, weights: np.ndarray, stride: int) -> np.ndarray:
    total = np.zeros(length, np.float32)
    for start in window_starts(length, len(weights), stride):
        part = total[start : start + len(weights)]
        part += weights[: len(part)]
    return total
