"""Pixels to other sizes, with masks: averages of areas, or between pixels.

Separable weights, so that a tall window is added up piece by piece: a window of any
height takes the memory of one piece and of the result.
"""

from __future__ import annotations

import numpy as np


def weights(start: float, stop: float, size: int) -> tuple[np.ndarray, int]:
    """How much of each pixel from `start` to `stop` an output pixel takes, on one axis.

    Where pixels are shrunk, an output pixel is the average of what it covers, to
    fractions of a pixel; where they are enlarged, it is interpolated linearly between
    the centres of pixels within the window.

    Returns:
      float32 [size, n], each row adds up to 1; and the first of the n pixels.
    """
    first, last = int(np.floor(start)), int(np.ceil(stop))
    places = np.arange(first, last)
    step = (stop - start) / size
    edges = start + step * np.arange(size + 1)
    if step >= 1:
        low = np.maximum(places[None], edges[:-1, None])
        high = np.minimum(places[None] + 1, edges[1:, None])
        taken = np.maximum(high - low, 0)
    else:
        centres = (edges[:-1] + edges[1:]) / 2 - 0.5
        centres = np.clip(centres, first, last - 1)
        taken = np.maximum(1 - np.abs(centres[:, None] - places[None]), 0)
    taken /= taken.sum(axis=1, keepdims=True)
    return taken.astype(np.float32), first


class Resampled:
    """Pieces of a window, full width, added up to the result.

    Pixels that are not valid count nothing: an output pixel is the average of the valid
    ones, and valid itself where they are at least half of its area.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, bands: int):
        self._rows, self._columns = rows, columns
        shape = (len(rows), len(columns))
        self._sums = np.zeros((*shape, bands), np.float32)
        self._areas = np.zeros(shape, np.float32)

    def add(self, top: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Add the rows from `top` on.

        values: [h, w, bands], 0 where not valid. valid: [h, w].
        """
        part = self._rows[:, top : top + len(valid)]
        used = np.flatnonzero(part.any(axis=1))
        if not len(used):
            return
        out = slice(used[0], used[-1] + 1)
        part = part[out]
        # Rows first: what is left for the columns is small.
        height, width, bands = values.shape
        short = (part @ values.reshape(height, width * bands)).reshape(-1, width, bands)
        self._sums[out] += self._columns @ short
        self._areas[out] += part @ valid.astype(np.float32) @ self._columns.T

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [height, width, bands], 0 where not valid; bool [height, width]."""
        # The weights of a row add up to 1, up to rounding.
        valid = self._areas >= 0.5 - 1e-4
        areas = np.where(valid, self._areas, 1)[..., None]
        return np.where(valid[..., None], self._sums / areas, 0), valid
