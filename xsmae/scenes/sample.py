"""Blocks of vectors, and a sample of them that does not depend on the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xsmae.errors import UserError, printable
from xsmae.scenes.embedded import EmbeddedGrid

if TYPE_CHECKING:
    from jaxtyping import Float

BYTES = 2**26  # of the vectors of a sample
SEED = 0


class Sample:
    """Vectors that are drawn at random with a fixed seed; all, if they are few.

    The same vectors in the same order give the same sample, in blocks of any size.
    """

    def __init__(self, width: int):
        self.most = max(BYTES // (4 * width), 1)
        self.count = 0
        self._random = np.random.default_rng(SEED)
        self._keys = np.zeros(0)
        self._places = np.zeros(0, np.int64)
        self._vectors = np.zeros((0, width), np.float32)

    def add(self, vectors: Float[np.ndarray, "n width"]) -> None:
        """See the next vectors."""
        # A vector stays if its number is among the smallest ones.
        keys = self._random.random(len(vectors))
        places = np.arange(self.count, self.count + len(vectors))
        self.count += len(vectors)
        near = np.ones(len(keys), bool)
        if len(self._keys) == self.most:
            near = keys < self._keys.max()
        keys = np.concatenate([self._keys, keys[near]])
        places = np.concatenate([self._places, places[near]])
        vectors = np.concatenate([self._vectors, vectors[near]])
        if len(keys) > self.most:
            kept = np.argpartition(keys, self.most)[: self.most]
            kept.sort()
            keys, places, vectors = keys[kept], places[kept], vectors[kept]
        self._keys, self._places, self._vectors = keys, places, vectors

    @property
    def vectors(self) -> Float[np.ndarray, "n width"]:
        """The sample, in the order of the vectors."""
        return self._vectors[np.argsort(self._places)]


def all_vectors(
    grids: Sequence[EmbeddedGrid], should_stop: Callable[[], bool]
) -> Iterator[Float[np.ndarray, "n width"]]:
    """The vectors of all scenes, a block at a time; UserError if there are none.

    Raises KeyboardInterrupt once `should_stop()` is true.
    """
    empty = True
    for grid in grids:
        for block in grid.blocks():
            if should_stop():
                raise KeyboardInterrupt
            empty = False
            yield block.vectors
    if empty:
        names = ", ".join(grid.name for grid in grids[:5])
        raise UserError(
            f"no cell of {printable(names)} has a vector: embed the scenes again"
        )
