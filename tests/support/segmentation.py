"""Images with masks: ramps that show their own places, and coloured squares."""

import dataclasses

import numpy as np

from xsmae.data.mask_classes import IGNORE


@dataclasses.dataclass
class Labelled:
    image: np.ndarray
    mask: np.ndarray
    gsd: float | tuple[float, float] = 1.0
    valid: np.ndarray | None = None


def ramp(height, width, **fields):
    """Each pixel shows its row and column; the mask has the column, modulo 7."""
    image = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.float32)
    return Labelled(image, (image[..., 1] % 7).astype(np.uint8), **fields)


def some_scenes(rng, number=4, side=24):
    """Squares of three colours; the mask has the colour, and an ignored row."""
    scenes = []
    for _ in range(number):
        mask = np.kron(rng.integers(0, 3, (3, 3)), np.ones((side // 3,) * 2))
        image = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])[
            mask.astype(int)
        ]
        image = (image + rng.integers(-20, 20, image.shape)).astype(np.uint8)
        mask = mask.astype(np.uint8)
        mask[0] = IGNORE
        scenes.append(Labelled(image, mask, gsd=1.0))
    return scenes
