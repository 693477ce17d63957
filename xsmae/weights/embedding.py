"""Embeds many images in batches: arrays, PIL images, files or a source."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xsmae.bands import BANDS, Bands
from xsmae.data.images import MODES, decode, to_rgb
from xsmae.data.square import marked, square
from xsmae.errors import BadImageError, UserError
from xsmae.weights.inputs import check_images

if TYPE_CHECKING:
    from jaxtyping import Float

EVERY = 10.0  # seconds between progress lines
THREADS = 4


@dataclasses.dataclass(frozen=True)
class Opened:
    """Images to embed, read one by one.

    read(index) -> the whole image [height, width, bands] with the encoder's bands, and
    its metres per pixel (None unless `has_gsd`). name(index): its name in messages.
    """

    count: int
    read: Callable[[int], tuple[np.ndarray, float | None]]
    name: Callable[[int], str]
    has_gsd: bool = False

    def __len__(self) -> int:
        return self.count


def open_images(images: Any, *, bands: Bands) -> Opened:
    """Open the images given to `Encoder.embed`; UserError for an unknown type."""
    if hasattr(images, "fingerprint") and hasattr(images, "class_names"):
        places = _places(bands, images.bands, repr(images))
        of_rasters = "float32" in (images.dtype, bands.dtype)
        if of_rasters and (images.dtype, images.units) != (bands.dtype, bands.units):
            raise UserError(
                f"{images!r} has {images.dtype} values ({images.units}), the encoder "
                f"reads {bands.dtype} ({bands.units})"
            )

        def read_record(index: int) -> tuple[np.ndarray, float]:
            record = images[index]
            return marked(record)[..., places], np.array(record.gsd)

        opened = Opened(len(images), read_record, images.id, has_gsd=True)
    elif hasattr(images, "ndim"):
        images = np.asarray(images)
        check_images(images, bands)
        opened = Opened(
            len(images), lambda i: (images[i], None), lambda i: f"image {i}"
        )
    else:
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if not isinstance(images, list | tuple):
            raise UserError(
                f"images of type {type(images).__name__}, expected an array, a list of "
                "arrays, PIL images or paths, or a source"
            )
        given = list(images)

        def name(index: int) -> str:
            item = given[index]
            return str(item) if isinstance(item, str | Path) else f"image {index}"

        opened = Opened(len(given), lambda i: (_pixels(given[i], bands), None), name)
    if not len(opened):
        raise UserError("there are no images to embed, expected at least one")
    return opened


def _pixels(item: Any, bands: Bands) -> np.ndarray:
    """An image of a list. The caller adds its name to UserError and BadImageError."""
    if hasattr(item, "ndim"):
        image = np.asarray(item)
        check_images(image[None], bands)
        return image
    if isinstance(item, Image.Image):
        if item.mode not in MODES:
            raise UserError(f"mode {item.mode}, expected one of {', '.join(MODES)}")
        image = np.asarray(to_rgb(item.copy()))  # to_rgb rotates in place
    elif isinstance(item, str | Path):
        image = decode(Path(item), min_side=1)
    else:
        raise UserError(
            f"is of type {type(item).__name__}, expected an array, a PIL image or a "
            "path"
        )
    return image[..., _places(bands, BANDS, "an image file")]


def _places(bands: Bands, names: tuple[str, ...], what: str) -> list[int]:
    """The positions of the encoder's bands in `names`; UserError if some are missing.

    Rasters may have more bands than the encoder reads.
    """
    found = bands.find(names)
    more = len(names) > len(found) and bands.dtype == "uint8"
    if None in found or more:
        raise UserError(
            f"{what} has the bands {', '.join(names)}, but the encoder reads "
            f"{', '.join(bands.names)}: give arrays with its bands in its order"
        )
    return found


def embed_all(
    encode: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    opened: Opened,
    *,
    gsd: Float[np.ndarray, "n 2"] | None,
    size: int,
    bands: Bands,
    batch_size: int,
    progress: bool,
) -> Float[np.ndarray, "n width"]:
    """`encode(images, gsd)` of all images, resized to `size`, in batches.

    gsd: of the images before resizing; None if images have their own or if the encoder
    reads none. All batches have the same shape. Raises UserError if an image cannot be
    used.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r}, expected 1 or more")
    batch_size, count = min(batch_size, len(opened)), len(opened)
    reads_gsd = opened.has_gsd or gsd is not None

    def load(index: int) -> tuple[np.ndarray, np.ndarray | float]:
        try:
            image, own = opened.read(index)
            told = own if opened.has_gsd else (1.0 if gsd is None else gsd[index])
            return square(image, told, size)
        except (BadImageError, UserError) as error:
            raise UserError(f"{opened.name(index)}: {error}") from None

    found, begin = [], time.monotonic()
    last = begin
    for rows in _ahead(load, count, batch_size):
        images, gsds = zip(*rows, strict=True)
        if len({image.dtype for image in images}) > 1:
            images = [bands.rescale(i) if i.dtype == bands.dtype else i for i in images]
        padding = (0, batch_size - len(rows))
        images = np.pad(np.stack(images), [padding, *[(0, 0)] * 3], "edge")
        if bands.has_valid and images.dtype != np.uint8:  # uint8 is refused by name
            images = bands.fill(images)
        told = np.stack([np.broadcast_to(np.float32(g), 2) for g in gsds])
        told = np.pad(told, [padding, (0, 0)], "edge")
        found.append(encode(images, told if reads_gsd else None)[: len(rows)])
        now = time.monotonic()
        if progress and now - last > EVERY:
            done = sum(map(len, found))
            rate = done / (now - begin)
            line = f"embedded {done} of {count} images, {rate:.0f} images/s"
            print(line, file=sys.stderr, flush=True)
            last = now
    return np.concatenate(found)


def _ahead(
    load: Callable[[int], Any], count: int, batch_size: int
) -> Iterator[list[Any]]:
    """Batches of `load(0)` to `load(count - 1)`; reads one batch ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        starts = range(0, count, batch_size)
        parts = [range(s, min(s + batch_size, count)) for s in starts]
        following = pool.map(load, parts[0])
        for part in [*parts[1:], range(0)]:
            rows, following = list(following), pool.map(load, part)
            yield rows
