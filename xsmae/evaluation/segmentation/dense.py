"""Frozen features of every patch or pixel, and controls that need no encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.data.mask_classes import IGNORE
from xsmae.errors import UserError
from xsmae.evaluation.segmentation.crops import Labelled
from xsmae.evaluation.segmentation.windows import Readable, padded, window_starts
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.models.taps import as_map

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

# From normalised images [n, height, width, bands] and their GSDs [n, 2] to features
# [n, rows, columns, width], of patches or of pixels.
Dense = Callable[[np.ndarray, np.ndarray], jax.Array]
Normalize = Callable[[np.ndarray], np.ndarray]


def last_tokens(encoder: FrozenEncoder) -> Dense:
    """The encoder's patch tokens, after its final norm if it has one."""
    graphdef, state = nnx.split(encoder.network)

    @jax.jit
    def encode(state, images, gsd):
        network = nnx.merge(graphdef, state)
        tokens = network(images, gsd=gsd).astype(jnp.float32)
        return as_map(tokens, network.grid(*images.shape[1:3]))

    return functools.partial(encode, state)


def neighbourhood_statistics(side: int) -> Dense:
    """Mean, standard deviation, minimum and maximum around each pixel: a control.

    The neighbourhood is a square of `side` pixels, cut at the edges of the image.
    Features: [n, height, width, 4 * bands].
    """
    window, steps = (1, side, side, 1), (1, 1, 1, 1)

    def over(images, start, operation):
        return jax.lax.reduce_window(images, start, operation, window, steps, "SAME")

    @jax.jit
    def statistics(images, gsd):
        count = np.outer(*(_counts(length, side) for length in images.shape[1:3]))
        count = jnp.asarray(count, jnp.float32)[None, ..., None]
        mean = over(images, 0.0, jax.lax.add) / count
        # Around the mean of the image, so that subtracting squares loses no digits.
        centred = images - images.mean(axis=(1, 2), keepdims=True)
        square = over(jnp.square(centred), 0.0, jax.lax.add) / count
        around = over(centred, 0.0, jax.lax.add) / count
        std = jnp.sqrt(jnp.maximum(square - jnp.square(around), 0))
        low = over(images, jnp.inf, jax.lax.min)
        high = over(images, -jnp.inf, jax.lax.max)
        return jnp.concatenate([mean, std, low, high], axis=-1)

    return statistics


def _counts(length: int, side: int) -> Int[np.ndarray, " length"]:
    """How many pixels of an axis are around each, with the edges cut."""
    places = np.arange(length)
    first = np.maximum(places - (side - 1) // 2, 0)
    return np.minimum(places + side // 2 + 1, length) - first


def normalizer(encoder: FrozenEncoder) -> Normalize:
    """From stored values of one image to what the encoder's network reads."""
    reading = encoder.reading

    def normalize(image):
        return reading.bands.normalize(reading(image[None]))[0]

    return normalize


def normalized(labelled: Labelled, normalize: Normalize) -> Float[np.ndarray, "h w b"]:
    """The whole image as networks read it; 0 where it has no value."""
    values = normalize(labelled.image)
    if labelled.valid is None:
        return values
    return np.where(labelled.valid[..., None], values, np.float32(0))


def window_features(
    dense: Dense,
    source: Sequence[Labelled],
    *,
    normalize: Normalize,
    crop: int,
    batch_size: int,
) -> tuple[Float[np.ndarray, "n rows columns width"], UInt8[np.ndarray, "n crop crop"]]:
    """float16 features and masks of windows that cover all images, computed once.

    Windows do not overlap unless the last one of an axis must. Raises UserError if a
    feature is not finite in float16.
    """
    features, masks = [], []
    for images, gsd, mask in _batches(source, normalize, crop, batch_size):
        with np.errstate(over="ignore"):  # infinite, and refused below
            found = np.asarray(dense(images, gsd))[: len(mask)].astype(np.float16)
        if not np.isfinite(found).all():
            raise UserError(
                "the encoder gives features that are not finite in float16: give "
                "another encoder"
            )
        features.append(found)
        masks.append(mask)
    return np.concatenate(features), np.concatenate(masks)


def _batches(
    source: Sequence[Labelled], normalize: Normalize, crop: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images and GSDs, padded to one shape, and masks of the windows of all images."""
    rows = []
    for window in _windows(source, normalize, crop):
        rows.append(window)
        if len(rows) == batch_size:
            yield tuple(np.stack(column) for column in zip(*rows, strict=True))
            rows = []
    if rows:
        images, gsd, masks = (np.stack(column) for column in zip(*rows, strict=True))
        missing = (0, batch_size - len(rows))
        images = np.pad(images, [missing, *[(0, 0)] * 3], "edge")
        yield images, np.pad(gsd, [missing, (0, 0)], "edge"), masks


def _windows(source, normalize, crop):
    for index in range(len(source)):
        labelled = source[index]
        gsd = np.broadcast_to(np.float32(labelled.gsd), 2)
        image = Readable.of(normalized(labelled, normalize), tuple(gsd))
        for top in window_starts(image.height, crop, crop):
            for left in window_starts(image.width, crop, crop):
                mask = np.full((crop, crop), IGNORE, np.uint8)
                known = labelled.mask[top : top + crop, left : left + crop]
                mask[: known.shape[0], : known.shape[1]] = known
                values = image.read(top, left, *known.shape)
                yield padded(values, crop), gsd, mask
