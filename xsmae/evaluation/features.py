"""Features of whole images, from a frozen encoder or from pixel statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xsmae.data.records import Record, Source, pixel_digest
from xsmae.data.square import central, marked, square
from xsmae.errors import BadImageError, UserError
from xsmae.models.pooling import POOLINGS

FEATURES = POOLINGS  # of an encoder; each pixel control has one feature of its own
THUMBNAIL_SIZE = 8  # pixels: the smallest scale in use, 12.5 % of 64

# From images [n, size, size, bands] and their GSDs [n, 2] to features [n, width].
# Images are uint8, or float32 with NaN where a pixel of a raster has no value.
Encode = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Whole images, resized for an evaluation.

    images: [n, size, size, bands], see `Encode`. gsd: [n, 2] metres per pixel after
    resizing. labels: [n]. index: [n], positions in the source. pixels: [n, 16] uint8,
    digests of the pixels before resizing.
    """

    images: np.ndarray
    gsd: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    pixels: np.ndarray


def spread(total: int, most: int) -> np.ndarray:
    """At most `most` indices (0: all), evenly spaced over `total` images."""
    if not most or most >= total:
        return np.arange(total)
    return np.arange(most) * total // most


def load_image(
    source: Source, index: int, size: int, resized: int | None = None
) -> tuple[Record, np.ndarray, np.ndarray]:
    """A record, its image resized for an evaluation, and its metres per pixel then.

    resized: see `Scale`. Raises BadImageError if the image cannot be used.
    """
    record = source[index]
    image, gsd = marked(record), np.array(record.gsd)
    if resized is None:
        return record, *square(image, gsd, size)
    return record, *central(image, gsd, size, resized=resized)


def read_images(
    source: Source,
    indices: np.ndarray,
    *,
    size: int,
    batch_size: int,
    resized: int | None = None,
    threads: int = 4,
) -> Iterator[EvalBatch]:
    """The images at `indices`, in order, without those that cannot be used."""

    def load(index):
        try:
            record, image, gsd = load_image(source, int(index), size, resized)
        except BadImageError:
            return None
        label = -1 if record.label is None else record.label
        digest = np.frombuffer(pixel_digest(record.image), np.uint8)
        return image, gsd, label, index, digest

    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(indices), batch_size)
        parts = [indices[start : start + batch_size] for start in starts]
        ahead = pool.map(load, parts[0]) if parts else ()
        for number in range(len(parts)):
            rows = [row for row in ahead if row is not None]
            # Read the next batch while the caller computes.
            following = parts[number + 1 : number + 2]
            ahead = pool.map(load, following[0]) if following else ()
            if rows:
                images, gsd, labels, index, pixels = zip(*rows, strict=True)
                yield EvalBatch(
                    images=np.stack(images),
                    gsd=np.stack([np.broadcast_to(np.float32(g), 2) for g in gsd]),
                    labels=np.array(labels),
                    index=np.array(index),
                    pixels=np.stack(pixels),
                )


def encode_batches(
    encode: Encode,
    source: Source,
    indices: np.ndarray,
    *,
    size: int,
    batch_size: int,
    resized: int | None = None,
    gsd_factor: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[EvalBatch, dict[str, np.ndarray]]]:
    """Batches of images and their features, feature name -> `encode(images, gsd)`.

    `encode` gets the GSD after resizing times `gsd_factor`; so does the batch's `gsd`.
    Batches are padded to one shape. size, resized: see `Scale`. Raises
    KeyboardInterrupt between batches once `should_stop()` is true.
    """
    sizes = {"size": size, "resized": resized}
    for batch in read_images(source, indices, **sizes, batch_size=batch_size):
        if should_stop():
            raise KeyboardInterrupt
        batch = dataclasses.replace(batch, gsd=batch.gsd * np.float32(gsd_factor))
        count = len(batch.images)
        padding = [(0, batch_size - count)]
        images = np.pad(batch.images, padding + [(0, 0)] * 3)
        # Repeat the last GSD: the encoder warns about a GSD outside its training.
        gsd = np.pad(batch.gsd, [*padding, (0, 0)], "edge")
        encoded = encode(images, gsd)
        yield batch, {k: np.asarray(v)[:count] for k, v in encoded.items()}


def extract(
    encode: Encode,
    source: Source,
    indices: np.ndarray,
    **options: Any,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The features of the images at `indices`, by name, and their labels.

    `options` are those of `encode_batches`. Raises UserError if no image can be used,
    and KeyboardInterrupt like `encode_batches`.
    """
    batches = encode_batches(encode, source, indices, **options)
    found = [(batch.labels, encoded) for batch, encoded in batches]
    if not found:
        raise UserError(
            f"none of the {len(indices)} images wanted from {source!r} can be used"
        )
    labels, features = zip(*found, strict=True)
    joined = {n: np.concatenate([f[n] for f in features]) for n in features[0]}
    return joined, np.concatenate(labels)


def image_statistics(images: np.ndarray, gsd: np.ndarray) -> dict[str, np.ndarray]:
    """Each band's mean, standard deviation, minimum and maximum: a control.

    images: [n, height, width, channels]; returns {"statistics": [n, 4 * channels]}.
    NaN, which marks pixels without a value, does not count.
    """
    pixels = images.reshape(len(images), -1, images.shape[-1]).astype(np.float32)
    kinds = (np.mean, np.std, np.min, np.max)
    if np.isnan(pixels).any():
        kinds = (np.nanmean, np.nanstd, np.nanmin, np.nanmax)
    parts = [statistic(pixels, axis=1) for statistic in kinds]
    return {"statistics": np.concatenate(parts, axis=1)}


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale both so that each training feature has mean 0 and variance 1."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    return (train - mean) / std, (test - mean) / std


def thumbnail(images: np.ndarray, gsd: np.ndarray) -> dict[str, np.ndarray]:
    """The pixels of the image at 8 x 8: a control that sees coarse colours.

    images: [n, size, size, channels]; returns {"thumbnail": [n, 64 * channels]}, uint8
    in 0-1. Pixels without a value get the mean of the others.
    """
    small = np.stack([square(image, 1.0, THUMBNAIL_SIZE)[0] for image in images])
    values = small.astype(np.float32)
    if images.dtype == np.uint8:
        values /= 255
    elif np.isnan(values).any():
        mean = np.nanmean(values, axis=(1, 2), keepdims=True)
        values = np.where(np.isnan(values), mean, values)
    return {"thumbnail": values.reshape(len(images), -1)}
