"""Checks for TIFFs: one picture of up to 8 bits per channel, without other bands.

Pillow opens more TIFFs and silently changes them: it cuts 16 bits to 8, drops a fourth
band and the second page, and leaves missing strips black. The first directory of a TIFF
describes its content, so `check_tiff` reads that before Pillow opens the file.
"""

import math
import operator
import os
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image

from xsmae.errors import BadImageError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS = 254, 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 322, 323, 324, 325
_NUMBERS = 339  # SampleFormat: the kind of numbers
_NODATA = 42113  # GDAL's tag: the value that marks pixels without data, as text
_READ = (
    _SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _STRIPS, _SAMPLES, _ROWS,
    _STRIP_SIZES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES, _NUMBERS,
    _NODATA,
)  # fmt: skip
_LISTS = (_BITS, _STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES, _NUMBERS, _NODATA)

_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 16: "Q"}
_RAW, _JPEG = 1, 7
_COMPRESSIONS = (_RAW, 5, 8, 32773, 32946)
_LARGE_TILE = 2**20  # pixels; even a small image may be stored in tiles of this size
_WHITE_IS_ZERO = 0
_BANDS_OF = {_WHITE_IS_ZERO: 1, 1: 1, 2: 3, 3: 1}  # supported colour space -> bands
_COLOUR_NAMES = {4: "a mask", 5: "mode CMYK", 6: "mode YCbCr", 8: "mode LAB"}
_NUMBER_NAMES = {2: "signed integers", 3: "floating-point numbers"}


def check_tiff(file: BinaryIO, *, max_pixels: int) -> None:
    """Raises BadImageError, in one line, for a TIFF that would be read with changes.

    Reads only the first directory. `max_pixels` also limits a tile, because Pillow
    decodes whole tiles.
    """
    tags, file_size, more = _read_directory(file)
    _check_numbers(tags)
    compression = tags.get(_COMPRESSION, (_RAW,))[0]
    if compression not in _COMPRESSIONS:
        # Inside a TIFF, the decoder silently fills in damaged parts of a JPEG.
        found = "JPEG" if compression == _JPEG else compression
        raise BadImageError(
            f"TIFF compression {found}; expected none, LZW, Deflate or PackBits"
        )
    _check_colours(tags)
    if more:
        raise BadImageError(
            "several pictures in one TIFF (pages, overviews or a mask); save one"
        )
    if tags.get(_SUBFILE, (0,))[0] & 5:
        raise BadImageError("a preview or mask in a TIFF; save the picture itself")
    _check_layout(tags, file_size, max_pixels)


def has_nodata(image: Image.Image) -> bool:
    """True if a pixel of a decoded TIFF is its no-data value in every band."""
    text = getattr(image, "tag_v2", {}).get(_NODATA)
    if text is None:
        return False
    try:
        value = float(text.strip("\0 ") if isinstance(text, str) else text)
    except (TypeError, ValueError):
        raise BadImageError(f"the no-data value {text!r} is not a number") from None
    pixels = np.asarray(image)
    equal = pixels == value
    return bool((equal if equal.ndim == 2 else equal.all(axis=-1)).any())


def _check_numbers(tags: dict[int, tuple[int, ...]]) -> None:
    kinds = set(tags.get(_NUMBERS, (1,)))
    bits = max(tags.get(_BITS, (1,)))
    if kinds != {1}:
        names = ", ".join(_NUMBER_NAMES.get(kind, "other numbers") for kind in kinds)
        raise BadImageError(
            f"{names} of {bits} bits; convert them to 8 bits with your scaling"
        )
    if bits > 8:
        raise BadImageError(
            f"{bits} bits a channel; convert it to 8 bits with your scaling"
        )


def _check_colours(tags: dict[int, tuple[int, ...]]) -> None:
    if _COLOURS not in tags:
        raise BadImageError("cannot be decoded: the TIFF names no colour space")
    colours, samples = tags[_COLOURS][0], tags.get(_SAMPLES, (1,))[0]
    bits = set(tags.get(_BITS, (1,)))
    if colours not in _BANDS_OF:
        name = _COLOUR_NAMES.get(colours, f"colour space {colours}")
        raise BadImageError(f"{name}; expected RGB, grey or an opaque palette")
    if samples != _BANDS_OF[colours]:
        raise BadImageError(
            f"{samples} bands in a TIFF; expected RGB or grey, without alpha, infrared "
            "or other bands"
        )
    if not bits <= ({8} if samples == 3 else {1, 2, 4, 8}):
        raise BadImageError(f"{max(bits)} bits a channel; expected 8")
    if _NODATA in tags and (colours == _WHITE_IS_ZERO or bits != {8}):
        raise BadImageError("a no-data value without plain 8-bit pixels; remove it")


def _check_layout(
    tags: dict[int, tuple[int, ...]], file_size: int, max_pixels: int
) -> None:
    """Checks that strips or tiles cover the picture and lie inside the file."""
    width, height = (tags.get(tag, (0,))[0] for tag in (_WIDTH, _HEIGHT))
    tiled = _TILES in tags
    if tiled:
        across, down = (tags.get(tag, (0,))[0] for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    else:
        across, down = width, min(tags.get(_ROWS, (height,))[0], height)
    if not (width and height and across and down) or (tiled and _STRIPS in tags):
        raise BadImageError("cannot be decoded: the TIFF's sizes are damaged")
    if tiled and across * down > max(max_pixels, _LARGE_TILE):
        raise BadImageError(
            f"declares tiles of {across} x {down} pixels, more than "
            f"max_pixels={max_pixels}"
        )
    offsets = tags.get(_TILES if tiled else _STRIPS, ())
    sizes = tags.get(_TILE_SIZES if tiled else _STRIP_SIZES, ())
    samples = tags.get(_SAMPLES, (1,))[0]
    planes = samples if tags.get(_PLANAR) == (2,) else 1
    rows = math.ceil(height / down)
    expected = math.ceil(width / across) * rows * planes
    # A sparse TIFF stores 0 for missing parts.
    if not len(offsets) == len(sizes) == expected or not all((*offsets, *sizes)):
        raise BadImageError(
            "cannot be decoded: pixels are missing, the TIFF has "
            f"{min(len(offsets), sum(map(bool, sizes)))} of {expected} strips or tiles"
        )
    if any(map(lambda at, size: at + size > file_size, offsets, sizes)):
        raise BadImageError("cannot be decoded: the TIFF is truncated")
    if tags.get(_COMPRESSION, (_RAW,)) == (_RAW,):
        bits = max(tags.get(_BITS, (1,)))
        line = math.ceil(across * samples // planes * bits / 8)
        needed = [line * down] * expected
        if not tiled:  # the last strip of each plane may be shorter
            needed[rows - 1 :: rows] = [line * (height - (rows - 1) * down)] * planes
        if any(map(operator.lt, sizes, needed)):
            raise BadImageError("cannot be decoded: the TIFF's strips are too short")


def _read_directory(file: BinaryIO) -> tuple[dict[int, tuple[int, ...]], int, bool]:
    """Reads the first directory of a TIFF.

    Returns the tags in `_READ`, the file's size in bytes, and True if another
    directory follows.
    """
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def take(size: int) -> bytes:
        content = file.read(size) if size <= file_size else b""
        if len(content) < size:
            raise BadImageError("cannot be decoded: the TIFF is truncated")
        return content

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(order + layout, take(struct.calcsize(order + layout)))

    magic = take(4)
    order = "<" if magic[:2] == b"II" else ">"
    # Formats of the number of entries, an entry's number of values, and an offset.
    if b"*" in magic:
        entries, number, offset = "HII"
    else:
        entries, number, offset = "QQQ"
        if unpack("HH") != (8, 0):
            raise BadImageError("cannot be decoded: the BigTIFF's header is damaged")
    file.seek(*unpack(offset))
    tags, places = {}, {}
    for _ in range(*unpack(entries)):
        tag, kind, count = unpack(f"HH{number}")
        value = take(struct.calcsize(offset))
        if tag not in _READ:
            continue
        if kind not in _TYPES or not count or (count > 1 and tag not in _LISTS):
            raise BadImageError(f"cannot be decoded: the TIFF's tag {tag} is damaged")
        layout = f"{order}{count}{_TYPES[kind]}"
        size = struct.calcsize(layout)
        if size <= len(value):
            tags[tag] = struct.unpack(layout, value[:size])
        else:
            places[tag] = (*struct.unpack(order + offset, value), layout)
    more = unpack(offset) != (0,)
    for tag, (place, layout) in places.items():
        file.seek(place)
        tags[tag] = unpack(layout[1:])
    return tags, file_size, more
