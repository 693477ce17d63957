"""What a segmentation keeps beside its row: confusion matrices, and examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data.masks import Segmentation
from xsmae.errors import UserError
from xsmae.evaluation.features import spread
from xsmae.evaluation.kept import writing_to
from xsmae.evaluation.segmentation.parts import MaskParts
from xsmae.evaluation.tasks.segment import Guess
from xsmae.process.files import atomic_write

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

CONFUSIONS = "confusions.npz"
EXAMPLES = "examples.npz"
SHOWN = 4  # test images, evenly spread
SIDE = 512  # pixels, the longer side of an example


class Examples:
    """The predictions for a few test images, every n-th pixel."""

    def __init__(self, source: Segmentation):
        self.source = source
        self.indices = spread(len(source), SHOWN)
        self._rows: dict[int, list[np.ndarray]] = {int(i): [] for i in self.indices}

    def add(self, guess: Guess) -> None:
        """Keep the rows of a prediction if its image is an example."""
        if guess.image in self._rows:
            self._rows[guess.image].append(guess.predicted.astype(np.uint8))

    def predicted(self) -> Iterator[tuple[int, int, UInt8[np.ndarray, "height width"]]]:
        """The place of each image, the step between its pixels, the prediction."""
        for index, rows in self._rows.items():
            whole = np.concatenate(rows)
            step = math.ceil(max(whole.shape) / SIDE)
            yield index, step, whole[::step, ::step]


@dataclasses.dataclass(frozen=True)
class Kept:
    """The folder of a row, read again.

    confusions: [images, true class, predicted class], of the images `ids` of `scenes`.
    examples: place in the test part -> step between the pixels, predicted classes.
    """

    confusions: Int[np.ndarray, "images classes classes"]
    ids: list[str]
    scenes: list[str]
    class_names: list[str]
    examples: dict[int, tuple[int, UInt8[np.ndarray, "height width"]]]


def write_kept(
    folder: Path,
    parts: MaskParts,
    confusions: Int[np.ndarray, "images classes classes"],
    examples: Examples,
) -> None:
    """Write the files of a row into its folder. Raises UserError if it cannot."""
    test, drawn = parts.test, {}
    for index, step, predicted in examples.predicted():
        drawn[f"{index}_{step}"] = predicted
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFUSIONS) as path, path.open("wb") as file:
            np.savez_compressed(
                file,
                confusions=confusions,
                ids=np.array([test.id(i) for i in range(len(test))]),
                scenes=np.array([test.scene(i) for i in range(len(test))]),
                class_names=np.array(parts.class_names),
            )
        with atomic_write(folder / EXAMPLES) as path, path.open("wb") as file:
            np.savez_compressed(file, **drawn)


def read_kept(folder: Path) -> Kept:
    """What `write_kept` wrote. Raises UserError if it is not there or damaged."""
    try:
        with np.load(folder / CONFUSIONS) as found:
            fields = {name: found[name] for name in found.files}
        with np.load(folder / EXAMPLES) as found:
            drawn = {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no {CONFUSIONS} or {EXAMPLES} that can be read ({error}): "
            "remove its row from the results to measure again"
        ) from None
    examples = {}
    for name, predicted in drawn.items():
        index, step = map(int, name.split("_"))
        examples[index] = (step, predicted)
    texts = {n: fields[n].tolist() for n in ("ids", "scenes", "class_names")}
    return Kept(fields["confusions"], **texts, examples=examples)
