"""Features of whole images: from a frozen encoder, and from image statistics alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from xsmae.data.sources import Source
from xsmae.errors import BadImageError, UserError

FEATURES = ("cls", "mean")


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Whole images at the size of evaluation.

    images: [n, size, size, 3] uint8. gsd: [n, 2] metres per pixel after resizing.
    labels: [n]. index: [n], where they lie in the source.
    """

    images: np.ndarray
    gsd: np.ndarray
    labels: np.ndarray
    index: np.ndarray


def spread(total: int, most: int) -> np.ndarray:
    """At most `most` indices (0: all), evenly spaced over a source of `total`."""
    if not most or most >= total:
        return np.arange(total)
    return np.arange(most) * total // most


def square(image: np.ndarray, gsd: float, size: int) -> tuple[np.ndarray, float]:
    """The largest central square, resized with antialiasing (bicubic), and its GSD."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    resized = Image.fromarray(image).resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    return np.asarray(resized), gsd * side / size


def read_images(
    source: Source, indices: np.ndarray, *, size: int, batch_size: int, threads: int = 4
) -> Iterator[EvalBatch]:
    """The images at `indices`, in order; those that cannot be used are left out."""

    def load(index):
        try:
            record = source[int(index)]
        except BadImageError:
            return None
        image, gsd = square(record.image, record.gsd, size)
        label = -1 if record.label is None else record.label
        return image, gsd, label, index

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), batch_size):
            rows = pool.map(load, indices[start : start + batch_size])
            rows = [row for row in rows if row is not None]
            if rows:
                images, gsd, labels, index = zip(*rows, strict=True)
                yield EvalBatch(
                    images=np.stack(images),
                    gsd=np.repeat(np.array(gsd, np.float32)[:, None], 2, axis=1),
                    labels=np.array(labels),
                    index=np.array(index),
                )


def extract(
    encode: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    source: Source,
    indices: np.ndarray,
    *,
    size: int,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`encode(images, gsd)` of the images of a source, by feature, and their labels.

    The last batch is padded, so that `encode` sees one shape. Raises KeyboardInterrupt
    between two batches once `should_stop()`, UserError where no image can be used.
    """
    features, labels = [], []
    for batch in read_images(source, indices, size=size, batch_size=batch_size):
        if should_stop():
            raise KeyboardInterrupt
        count = len(batch.images)
        padding = [(0, batch_size - count)]
        images = np.pad(batch.images, padding + [(0, 0)] * 3)
        gsd = np.pad(batch.gsd, [*padding, (0, 0)], constant_values=1.0)
        encoded = encode(images, gsd)
        features.append({k: np.asarray(v)[:count] for k, v in encoded.items()})
        labels.append(batch.labels)
    if not features:
        raise UserError(
            f"none of the {len(indices)} images asked for of {source!r} can be used"
        )
    joined = {n: np.concatenate([f[n] for f in features]) for n in features[0]}
    return joined, np.concatenate(labels)


def image_statistics(images: np.ndarray, gsd: np.ndarray) -> dict[str, np.ndarray]:
    """Per band: mean, standard deviation, minimum, maximum. The control of every table.

    images: [n, height, width, channels]; returns {"statistics": [n, 4 * channels]}.
    """
    pixels = images.reshape(len(images), -1, images.shape[-1]).astype(np.float32)
    parts = [pixels.mean(1), pixels.std(1), pixels.min(1), pixels.max(1)]
    return {"statistics": np.concatenate(parts, axis=1)}


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both to zero mean and unit variance a feature, by the training part's numbers."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    return (train - mean) / std, (test - mean) / std
