"""Random crops of images and masks for training, each with its own GSD."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from xsmae.data.mask_classes import IGNORE
from xsmae.data.raster_resample import Resampled, weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped, UInt8

TRIES = 10  # of a crop in which one class covers too much


class Labelled(Protocol):
    """An image with a class for each pixel, a record of a segmentation source.

    image: [height, width, bands] as stored. mask: [height, width], a class or `IGNORE`.
    gsd: metres per pixel, one number or (y, x). valid: the pixels that have a value;
    None if all have.
    """

    image: Shaped[np.ndarray, "height width bands"]
    mask: UInt8[np.ndarray, "height width"]
    gsd: float | tuple[float, float]
    valid: Bool[np.ndarray, "height width"] | None


@dataclasses.dataclass(frozen=True)
class Crop:
    """image: [size, size, bands], normalised. mask: [size, size]. gsd: [2], (y, x)."""

    image: Float[np.ndarray, "size size bands"]
    mask: UInt8[np.ndarray, "size size"]
    gsd: Float[np.ndarray, " 2"]


@dataclasses.dataclass(frozen=True)
class CropSampler:
    """Draws a crop of a labelled image.

    size: pixels. scale: the smallest and the largest factor by which an image is
    resized first, log-uniform. max_share: a crop in which one class covers more of the
    pixels that count is drawn again; the most balanced of ten tries is kept.
    horizontal_flip, vertical_flip: probabilities. quarter_turns: the probability of a
    turn by 0, 90, 180 or 270 degrees. normalize: from stored values to what the network
    reads.
    """

    size: int
    scale: tuple[float, float]
    max_share: float
    horizontal_flip: float
    vertical_flip: float
    quarter_turns: float
    normalize: Callable[[np.ndarray], np.ndarray]

    def __call__(self, labelled: Labelled, rng: np.random.Generator) -> Crop:
        """A crop. Where the resized image is smaller, the crop is filled up.

        The filling repeats the last row and column and does not count.
        """
        factor = np.exp(rng.uniform(*np.log(self.scale)))
        sides = labelled.mask.shape
        scaled = [max(round(side * factor), 1) for side in sides]
        places = [_Places(*pair) for pair in zip(sides, scaled, strict=True)]
        (rows, columns), mask = self._place(labelled.mask, places, rng)
        image = self._resample(labelled, rows, columns)
        down, across = (self.size - side for side in mask.shape)
        image = np.pad(image, [(0, down), (0, across), (0, 0)], "edge")
        mask = np.pad(mask, [(0, down), (0, across)], constant_values=IGNORE)
        gsd = np.broadcast_to(np.float32(labelled.gsd), 2) * [
            place.pixels_per_pixel for place in places
        ]
        return self._turned(Crop(image, mask, gsd.astype(np.float32)), rng)

    def _place(self, mask, places, rng):
        """The rows and columns of the chosen crop, and its mask."""
        best, least = None, np.inf
        for _ in range(TRIES):
            spans = [place.draw(self.size, rng) for place in places]
            found = mask[np.ix_(*(span.nearest() for span in spans))]
            share = largest_share(found)
            if share < least:
                best, least = (spans, found), share
            if share <= self.max_share:
                break
        return best

    def _resample(self, labelled, rows, columns):
        window = (slice(rows.first, rows.last), slice(columns.first, columns.last))
        values = self.normalize(labelled.image[window])
        valid = labelled.valid
        valid = np.ones(values.shape[:2], bool) if valid is None else valid[window]
        values = np.where(valid[..., None], values, np.float32(0))
        resampled = Resampled(rows.weights(), columns.weights(), values.shape[-1])
        resampled.add(0, values, valid)
        return resampled.result()[0]

    def _turned(self, crop, rng):
        image, mask, gsd = crop.image, crop.mask, crop.gsd
        for axis, probability in enumerate((self.vertical_flip, self.horizontal_flip)):
            if rng.uniform() < probability:
                image, mask = np.flip(image, axis), np.flip(mask, axis)
        if rng.uniform() < self.quarter_turns:
            turns = int(rng.integers(4))
            image, mask = np.rot90(image, turns), np.rot90(mask, turns)
            gsd = gsd[::-1] if turns % 2 else gsd
        return Crop(*map(np.ascontiguousarray, (image, mask, gsd)))


def largest_share(mask: UInt8[np.ndarray, "height width"]) -> float:
    """The share of the most frequent class; 1 if no pixel counts."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


@dataclasses.dataclass(frozen=True)
class _Places:
    """An axis of an image of `side` pixels that is resized to `scaled` pixels."""

    side: int
    scaled: int

    @property
    def pixels_per_pixel(self) -> float:
        return self.side / self.scaled

    def draw(self, size: int, rng: np.random.Generator) -> _Span:
        length = min(size, self.scaled)
        start = int(rng.integers(self.scaled - length + 1))
        step = self.pixels_per_pixel
        return _Span(start * step, min((start + length) * step, self.side), length)


@dataclasses.dataclass(frozen=True)
class _Span:
    """A part of an axis, in pixels of the image, and its length in pixels of a crop."""

    start: float
    stop: float
    length: int

    @property
    def first(self) -> int:
        return int(np.floor(self.start))

    @property
    def last(self) -> int:
        return int(np.ceil(self.stop))

    def nearest(self) -> np.ndarray:
        """The image pixel under the centre of each crop pixel."""
        step = (self.stop - self.start) / self.length
        centres = self.start + (np.arange(self.length) + 0.5) * step
        return np.clip(np.floor(centres).astype(int), self.first, self.last - 1)

    def weights(self) -> np.ndarray:
        return weights(self.start, self.stop, self.length)[0]


def crops_of_steps(
    source: Sequence[Labelled],
    sampler: Callable[[Any, np.random.Generator], Crop],
    *,
    batch_size: int,
    seed: int,
    start: int,
    num_steps: int,
    threads: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, GSDs and masks of the steps after `start`.

    Every image comes once per epoch, in an order of its own. A crop depends only on the
    seed and its place among all crops, so the number of threads changes nothing.
    """

    def crop(place):
        epoch, row = divmod(place, len(source))
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(source))
        return sampler(source[int(order[row])], np.random.default_rng((seed, 1, place)))

    def places(step):
        return range(step * batch_size, (step + 1) * batch_size)

    with ThreadPoolExecutor(threads) as pool:
        ahead = pool.map(crop, places(start)) if start < num_steps else ()
        for step in range(start, num_steps):
            crops = list(ahead)
            # Cut the next crops while the device computes.
            ahead = pool.map(crop, places(step + 1)) if step + 1 < num_steps else ()
            yield tuple(
                np.stack([getattr(crop, name) for crop in crops])
                for name in ("image", "gsd", "mask")
            )
