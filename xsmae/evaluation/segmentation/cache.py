"""Features of windows on disk: computed once per group of images, read by rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.evaluation.cache import EVERY, create_folder, mapped, read, unknown, write
from xsmae.evaluation.segmentation.crops import Labelled
from xsmae.evaluation.segmentation.dense import Dense, Normalize, window_features
from xsmae.evaluation.segmentation.windows import window_starts

if TYPE_CHECKING:
    from jaxtyping import Shaped

VERSION = 1  # raise it when the same encoder and images give different features


class Rows:
    """An array of one row per window, on disk: `rows[[3, 1]]` reads two of them."""

    def __init__(
        self, name: str, files: Sequence[Path], places: Sequence[tuple[int, int]]
    ):
        self._name, self._files, self._places = name, files, places
        first = mapped(files[places[0][0]], name)
        self.shape, self.dtype = (len(places), *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: np.ndarray) -> Shaped[np.ndarray, "rows ..."]:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        # Files are opened when they are needed: thousands may not be open at once.
        for place, row in enumerate(rows):
            file, index = self._places[row]
            found[place] = mapped(self._files[file], self._name)[index]
        return found


def cached_windows(
    dense: Dense,
    source: Sequence[Labelled],
    folder: Path,
    *,
    normalize: Normalize,
    crop: int,
    batch_size: int,
    title: str,
    say: Callable[[str], None],
) -> tuple[Rows, Rows]:
    """The features and the masks of `window_features`, kept in `folder`.

    folder: its name must have everything that decides the features. There is one file
    for each group of images whose windows fill a batch, written atomically. So a
    command that was stopped resumes after the last group, and ends with the same
    features. A damaged file is reported and computed again. The memory is that of a
    group.
    """
    create_folder(folder)
    missing = unknown(folder, len(source), say)
    begin = last = time.monotonic()
    done = len(source) - len(missing)
    for indices, images in _groups(source, missing, crop, batch_size):
        features, masks = window_features(
            dense, images, normalize=normalize, crop=crop, batch_size=batch_size
        )
        counts = [_count(image, crop) for image in images]
        write(
            folder / f"{indices[0]:09}.safetensors",
            {
                "features": features,
                "masks": masks,
                "positions": np.repeat(indices, counts),
                "covered": np.array(indices),
            },
        )
        done += len(indices)
        now = time.monotonic()
        if now - last > EVERY and done < len(source):
            rate = (done - len(source) + len(missing)) / (now - begin)
            say(f"{title}: {done}/{len(source)}, {rate:.2g} images/s")
            last = now
    said = "" if len(missing) else " (cached)"
    say(f"{title}: {len(source)}/{len(source)}{said}")
    files, places = _places(folder)
    return Rows("features", files, places), Rows("masks", files, places)


def _groups(
    source: Sequence[Labelled], wanted: np.ndarray, crop: int, batch_size: int
) -> Iterator[tuple[list[int], list[Labelled]]]:
    """Images that follow each other, until their windows fill a batch."""
    indices, images, windows = [], [], 0
    for index in wanted:
        image = source[int(index)]
        indices.append(int(index))
        images.append(image)
        windows += _count(image, crop)
        if windows >= batch_size:
            yield indices, images
            indices, images, windows = [], [], 0
    if indices:
        yield indices, images


def _count(image: Labelled, crop: int) -> int:
    return int(np.prod([len(window_starts(s, crop, crop)) for s in image.mask.shape]))


def _places(folder: Path) -> tuple[list[Path], list[tuple[int, int]]]:
    """All files, and (file, row) of each window, in the order of the images."""
    files, found = sorted(folder.glob("[0-9]*.safetensors")), {}
    for number, file in enumerate(files):
        of_image: dict[int, list[tuple[int, int]]] = {}
        for row, position in enumerate(read(file, "positions").tolist()):
            of_image.setdefault(position, []).append((number, row))
        # Two processes that started together may have written the same images.
        found = of_image | found
    return files, [place for position in sorted(found) for place in found[position]]
