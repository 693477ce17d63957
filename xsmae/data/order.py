"""The order of a run's images: shuffled anew in every epoch, with groups side by side.

Images of a group share a read. Side by side they are in one batch, which one worker
reads. Where a group begins is as random as where a single image would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grain
import numpy as np

from xsmae.data.records import Source

if TYPE_CHECKING:
    from jaxtyping import Int


class GroupOrder:
    """Position in a run -> index of the image; it depends on the seed alone.

    groups: the number of each image's group, 0 to the number of groups.
    """

    def __init__(self, groups: Int[np.ndarray, " n"], seed: int):
        self._groups, self._seed = groups, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, len(self._groups))
        return int(self._of(epoch)[place])

    def _of(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            # `pipeline.draws_of` has the streams 0 and 1.
            rng = np.random.default_rng((self._seed, 2, epoch))
            place = rng.permutation(self._groups.max() + 1)
            order = np.argsort(place[self._groups], kind="stable")
            # Batches that are read ahead may be of the next epoch. A new dictionary:
            # threads share this one.
            near = {e: o for e, o in self._epochs.items() if abs(e - epoch) < 2}
            self._epochs = {**near, epoch: order}
        return order

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_epochs": {}}


def shuffled(source: Source, *, seed: int, epochs: int) -> grain.MapDataset:
    """The indices of `source` for some epochs, each in another order."""
    if source.groups is None:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)
    order = GroupOrder(source.groups, seed)
    return grain.MapDataset.range(len(source) * epochs).map(order)
