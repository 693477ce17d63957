"""Strict decoding of image files: what is converted, what is refused, and why.

Converted, since nothing is lost:

| found                                                    | result                 |
|----------------------------------------------------------|------------------------|
| RGB                                                      | kept                   |
| L (grey, 1 to 8 bits), 1 (black and white)               | grey repeated 3 times  |
| P (palette), opaque                                      | its colours            |
| LA, RGBA, or a transparent colour, alpha 255 everywhere; | alpha dropped          |
| not in a TIFF                                            |                        |
| EXIF orientation                                         | applied                |
| several pictures in one JPEG (MPO; drones, phones)       | the first, the primary |

Refused with `BadImageError`, since something would be lost or guessed:

| found                                                    | why                    |
|----------------------------------------------------------|------------------------|
| any alpha below 255; pixels with the no-data value       | pixels without a value |
| CMYK and every other mode                                | needs a colour profile |
| 16 bits a channel (PIL would drop the low byte), floats  | needs a scaling        |
| a TIFF with alpha, infrared or other bands               | which are the colours? |
| animated PNG or WebP; a TIFF of several pages, with      | which frame?           |
| overviews or with a mask                                 |                        |
| not a JPEG, PNG, WebP or TIFF, whatever its name; empty  | not an image           |
| truncated, broken, unreadable, missing, a PNG with wrong | no or invented pixels  |
| checksums, a TIFF without some of its pixels             |                        |
| more pixels declared than `max_pixels`                   | a decompression bomb   |
| shorter side below `min_side`                            | too small to crop from |

A TIFF is read if a PNG could hold the same pixels and it is uncompressed, LZW, Deflate
or PackBits. Other TIFFs (more bands, more bits, floats, masks) are refused here;
`xsmae.open_raster` reads them. `tiff.py` has the checks.

Embedded colour profiles are ignored. PIL's own bomb limit (twice
`PIL.Image.MAX_IMAGE_PIXELS`) is the upper bound of `max_pixels`.
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

FORMATS = ("JPEG", "PNG", "WEBP")  # and TIFF, after check_tiff
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MIN_SIDE = 32
MAX_PIXELS = 89_478_485  # PIL.Image.MAX_IMAGE_PIXELS: 256 MiB of RGB

_PNG = b"\x89PNG\r\n\x1a\n"
MODES = ("RGB", "L", "1", "P", "LA", "PA", "RGBA")


def decode(
    source: bytes | pathlib.Path,
    *,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP or TIFF file to RGB, with the checks of this module.

    Args:
      source: the encoded bytes, or the path of the file.
      min_side: in pixels; an image with a shorter side is refused.
      max_pixels: an image with more pixels in its header is refused before decoding.

    Returns:
      uint8 [height, width, 3], writable.

    Raises:
      BadImageError: the reason, in one line without a path.
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
    """Opens a file for `to_rgb`: reads and checks the header, decodes nothing.

    It takes the arguments of `decode` and raises the same errors.
    """
    with contextlib.ExitStack() as stack:
        with _bad_images():
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            # Opening a named pipe would wait forever.
            elif not source.is_file():
                found = "is not a regular file" if source.exists() else "does not exist"
                raise BadImageError(f"the file {found}")
            else:
                file = stack.enter_context(source.open("rb"))
            image = stack.enter_context(_open(file, min_side, max_pixels))
        yield image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 (upright) to 8; raises BadImageError.

    A PNG must be decoded first, since the tag may come after the pixels. Pillow itself
    turns a TIFF upright.
    """
    if image.format == "TIFF":
        return 1
    with _bad_images():
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image, upright and in RGB; raises BadImageError.

    It may return the given image itself.
    """
    with _bad_images():
        # Work in place and convert only if needed: copying a large image costs up to a
        # third of the time to decode it.
        ImageOps.exif_transpose(image, in_place=True)
        return _opaque_rgb(image)


def read_numbers(path: pathlib.Path, *, max_pixels: int, shape: tuple) -> np.ndarray:
    """The numbers of a PNG as stored: uint8 [height, width], or [height, width, 3].

    Those of a palette are its indices. shape: the height and width that are expected.
    Raises BadImageError for other sizes and formats, alpha and 16 bits.
    """
    bits = _png_bits(path)
    if bits == 16:
        raise BadImageError("16 bits; expected a PNG of 8 bits, or a GeoTIFF")
    with open_image(path, min_side=1, max_pixels=max_pixels) as image:
        if image.format != "PNG":
            raise BadImageError(f"{image.format}; expected PNG, which keeps numbers")
        if image.size[::-1] != tuple(shape):
            raise BadImageError(
                f"{image.height} x {image.width} pixels (height x width), its image "
                f"has {shape[0]} x {shape[1]}; expected the same size"
            )
        if image.mode not in ("1", "L", "P", "RGB"):
            raise BadImageError(
                f"mode {image.mode}; expected one band of numbers, or red, green and "
                "blue"
            )
        with _bad_images():
            numbers = np.array(image)
    if numbers.dtype == bool:
        return numbers.astype(np.uint8)
    # Pillow spreads grey of 2 and 4 bits over 0 to 255.
    if image.mode == "L" and bits < 8:
        numbers //= 255 // (2**bits - 1)
    return numbers


def _png_bits(path: pathlib.Path) -> int:
    """Bits of a channel in the header of a PNG; 8 for anything else."""
    if not path.is_file():
        return 8
    with _bad_images(), path.open("rb") as file:
        header = file.read(25)
    return header[24] if header.startswith(_PNG) and len(header) == 25 else 8


@contextlib.contextmanager
def _bad_images() -> Iterator[None]:
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not a readable JPEG, PNG, WebP or TIFF file") from error
    # For a broken file, PIL's parsers raise OSError, SyntaxError, ValueError,
    # struct.error, EOFError, IndexError, ZeroDivisionError and more.
    except Exception as error:
        raise BadImageError(f"cannot be decoded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    # Unlike str(OSError), strerror does not contain the path.
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _open(file: BinaryIO, min_side: int, max_pixels: int) -> Image.Image:
    header = file.read(26)
    if not header:
        raise BadImageError("the file is empty (0 bytes)")
    # PIL opens 16-bit colour PNGs as 8-bit RGB. Byte 24 of the header is the bit depth.
    if header.startswith(_PNG) and header[24:25] == b"\x10":
        raise BadImageError("16 bits a channel; convert it to 8 bits with your scaling")
    formats = FORMATS
    if header.startswith(MAGIC):
        check_tiff(file, max_pixels=max_pixels)
        formats = ("TIFF",)
    file.seek(0)
    try:
        image = Image.open(file, formats=formats)
        if image.format == "PNG" and image.width * image.height <= max_pixels:
            # PIL decodes without checking the pixels' checksums. verify() checks them.
            # It reads the file but decodes nothing.
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
    # In an MPO, the first picture is the photograph and the others are previews.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise BadImageError(f"animated ({image.n_frames} frames); save one frame")
    if image.mode not in MODES:
        raise BadImageError(
            f"mode {image.mode}; expected RGB, grey or an opaque palette"
        )
    return image


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if has_nodata(image):
        raise BadImageError("pixels without a value (the TIFF's no-data value)")
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
    """Cuts a box and its surroundings out of an image without resizing.

    Args:
      image: [height, width, channels].
      box: x, y, width, height in pixels.
      context: the fraction of the box's side to add on EACH side, clipped to the
        image.
      min_side: in pixels; a smaller window grows around its centre, within the image.

    Returns:
      [h, w, channels], a copy, both sides at least min(min_side, the image's).

    Raises:
      BadImageError: the box has no area, or lies outside the image.
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
    """The window that `crop_with_context` cuts out of an image [height, width, ...].

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
