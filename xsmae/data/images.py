"""Image files to pixels, strictly: what is converted, what is refused, and why.

Converted, since nothing is lost:

| what is found                                            | what is made of it     |
|----------------------------------------------------------|------------------------|
| RGB                                                      | kept                   |
| L (grey, 1 to 8 bits), 1 (black and white)               | grey repeated 3 times  |
| P (palette), opaque                                      | its colours            |
| LA, RGBA, or a transparent colour, alpha 255 everywhere; | alpha left out         |
| not in a TIFF                                            |                        |
| EXIF orientation                                         | applied                |
| several pictures in one JPEG (MPO; drones, phones)       | the first, the primary |

Refused with `BadImageError`, since something would be lost or guessed:

| what is found                                            | why                    |
|----------------------------------------------------------|------------------------|
| any alpha below 255; a no-data value that occurs         | pixels without a value |
| CMYK and every other mode                                | needs a colour profile |
| 16 bits a channel (PIL would drop the low byte), floats  | needs a scaling        |
| a TIFF with alpha, infrared or other bands               | which are the colours? |
| animated PNG or WebP; a TIFF of several pages, with      | which frame?           |
| overviews or with a mask                                 |                        |
| not a JPEG, PNG, WebP or TIFF, whatever its name; empty  | not an image           |
| truncated, broken, unreadable, missing, a PNG whose      | no or invented pixels  |
| checksums do not hold, a TIFF without some of its pixels |                        |
| more pixels declared than `max_pixels`                   | a decompression bomb   |
| shorter side below `min_side`                            | too small to crop from |

A TIFF is read where it holds what a PNG could hold: uncompressed, LZW, Deflate or
PackBits. What it can hold beyond that (more bands, more bits, floats, masks) needs a
reader of rasters, which is not part of this package. `tiff.py` has the checks.

Embedded colour profiles are neither applied nor an error. PIL's own bomb limit (twice
`PIL.Image.MAX_IMAGE_PIXELS`) stays the upper bound of `max_pixels`.
"""

import contextlib
import io
import math
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from xsmae.data.tiff import MAGIC, check_tiff, has_nodata
from xsmae.errors import BadImageError

FORMATS = ("JPEG", "PNG", "WEBP")  # and TIFF, once it is checked
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MIN_SIDE = 32
MAX_PIXELS = 89_478_485  # PIL.Image.MAX_IMAGE_PIXELS: 256 MiB of RGB

MODES = ("RGB", "L", "1", "P", "LA", "PA", "RGBA")


def decode(
    source: bytes | pathlib.Path,
    *,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP or TIFF file to RGB; the module says what is refused.

    Args:
      source: the encoded bytes, or the path of the file.
      min_side: pixels; a shorter side below this is refused.
      max_pixels: the header's width x height above this is refused, undecoded.

    Returns:
      uint8 [height, width, 3], writable.

    Raises:
      BadImageError: the reason, in one line that names no path.
    """
    with open_image(source, min_side=min_side, max_pixels=max_pixels) as image:
        return np.array(to_rgb(image))


@contextlib.contextmanager
def open_image(
    source: bytes | pathlib.Path,
    *,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """Opens a file for `to_rgb`: its header is read and checked, nothing is decoded.

    Arguments and errors are those of `decode`.
    """
    with contextlib.ExitStack() as stack:
        with _bad_images():
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            # Opening a named pipe would wait for ever.
            elif not source.is_file():
                found = "is not a regular file" if source.exists() else "does not exist"
                raise BadImageError(f"the file {found}")
            else:
                file = stack.enter_context(source.open("rb"))
            image = stack.enter_context(_open(file, min_side, max_pixels))
        yield image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 (upright) to 8; raises BadImageError.

    A PNG is decoded for it, since the tag may come after the pixels. Pillow turns a
    TIFF by itself: it is upright from the start.
    """
    if image.format == "TIFF":
        return 1
    with _bad_images():
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image, upright and in RGB; raises BadImageError.

    The image that is returned may be the one given.
    """
    with _bad_images():
        # In place, and converted only where needed: a copy of a large image costs as
        # much as a third of its decoding.
        ImageOps.exif_transpose(image, in_place=True)
        return _opaque_rgb(image)


@contextlib.contextmanager
def _bad_images() -> Iterator[None]:
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not a readable JPEG, PNG, WebP or TIFF file") from error
    # PIL's parsers let OSError, SyntaxError, ValueError, struct.error, EOFError,
    # IndexError, ZeroDivisionError and more escape from a broken file.
    except Exception as error:
        raise BadImageError(f"cannot be decoded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    # strerror leaves out the path that str(OSError) ends with.
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _open(file: BinaryIO, min_side: int, max_pixels: int) -> Image.Image:
    header = file.read(26)
    if not header:
        raise BadImageError("the file is empty (0 bytes)")
    # PIL opens 16-bit colour PNGs as 8-bit RGB; byte 24 of the header is the depth.
    if header.startswith(b"\x89PNG\r\n\x1a\n") and header[24:25] == b"\x10":
        raise BadImageError("16 bits a channel; convert it to 8 bits with your scaling")
    formats = FORMATS
    if header.startswith(MAGIC):
        check_tiff(file, max_pixels=max_pixels)
        formats = ("TIFF",)
    file.seek(0)
    try:
        image = Image.open(file, formats=formats)
        if image.format == "PNG" and image.width * image.height <= max_pixels:
            # PIL decodes without looking at the pixels' checksums, and stops before the
            # last when all rows are there. Looking takes a file's reading, no decoding.
            image.verify()
            file.seek(0)
            image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(
            f"declares more pixels than PIL's limit of {Image.MAX_IMAGE_PIXELS}; cut "
            "the image into windows"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(
            f"declares {width} x {height} pixels, more than max_pixels={max_pixels}; "
            "raise --config.data.max_pixels, or cut the image into windows"
        )
    if min(width, height) < min_side:
        raise BadImageError(
            f"{width} x {height} pixels: the shorter side is below min_side={min_side}"
        )
    # MPO: the first picture is the photograph, the others are previews of it.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise BadImageError(f"animated ({image.n_frames} frames); save one frame")
    if image.mode not in MODES:
        raise BadImageError(
            f"mode {image.mode}; expected RGB, grey or an opaque palette"
        )
    return image


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if has_nodata(image):
        raise BadImageError("pixels without a value (they are the TIFF's no-data)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest = image.getchannel("A").getextrema()[0]
        if lowest < 255:
            raise BadImageError(f"partly transparent (alpha down to {lowest})")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_with_context(
    image: np.ndarray,
    box: tuple[float, float, float, float],
    *,
    context: float,
    min_side: int,
) -> np.ndarray:
    """Cuts a box and its surroundings out of an image; the scale stays the same.

    Args:
      image: [height, width, channels].
      box: x, y, width, height in pixels.
      context: the fraction of the box's side that is added on EACH side, clipped to
        the image.
      min_side: pixels; a smaller window grows around its centre, within the image.

    Returns:
      [h, w, channels], a copy, both sides at least min(min_side, the image's).

    Raises:
      BadImageError: the box has no area, or none of it lies in the image.
    """
    left, top, right, bottom = context_window(
        image.shape, box, context=context, min_side=min_side
    )
    return image[top:bottom, left:right].copy()


def context_window(
    shape: tuple[int, ...],
    box: tuple[float, float, float, float],
    *,
    context: float,
    min_side: int,
) -> tuple[int, int, int, int]:
    """What `crop_with_context` cuts out of an image [height, width, ...].

    Returns left, top, right, bottom in whole pixels.
    """
    x, y, width, height = box
    rows, columns = shape[:2]
    if (
        not all(map(math.isfinite, box))
        or min(width, height) <= 0
        or not (-width < x < columns and -height < y < rows)
    ):
        raise BadImageError(
            f"bounding box {list(box)} does not lie in the {columns} x {rows} image"
        )
    left, right = _window(x, width, columns, context, min_side)
    top, bottom = _window(y, height, rows, context, min_side)
    return left, top, right, bottom


def _window(
    start: float, length: float, size: int, context: float, min_side: int
) -> tuple[int, int]:
    low = max(0, math.floor(start - context * length))
    high = min(size, math.ceil(start + length + context * length))
    side = min(min_side, size)
    if high - low < side:
        low = min(max(0, low - (side - (high - low)) // 2), size - side)
        high = low + side
    return low, high
