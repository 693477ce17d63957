"""Broken and unusual image files: names, bytes and expected outcomes.

An outcome is READ, or a pattern for the error message.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

READ = ""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
# The reason depends on where the file is cut.
BROKEN = "cannot be decoded|not a readable|empty|shorter side"


def scene(height: int = 64, width: int = 72) -> Image.Image:
    """A fixed image with edges and colours."""
    rows, columns = np.mgrid[:height, :width]
    bands = [rows * 3 % 256, columns * 3 % 256, (rows // 8 + columns // 8) % 2 * 200]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def corpus() -> Iterator[tuple[str, bytes, str]]:
    """Yields (name, content, outcome) for every file."""
    whole = {name: encoded(scene(), name) for name in FORMATS}
    for name, content in whole.items():
        yield f"{name} whole", content, READ
        for tenths in range(10):
            part = content[: len(content) * tenths // 10]
            yield f"{name} cut after {tenths} tenths", part, BROKEN
        yield f"{name} with more behind it", content + b"more" * 100, READ
    yield "HTML", b"<!DOCTYPE html><html><body>404</body></html>", "not a readable"
    yield "text", b"an image would be here", "not a readable"
    yield "zeros", bytes(5000), "not a readable"
    yield from _sizes(whole)
    yield from _modes()
    yield from _orientations()
    yield from _tiffs()
    for name in ("GIF", "BMP", "PPM"):
        yield f"{name}", encoded(scene(), name), "not a readable"
    frames = [scene(), scene().rotate(180)]
    for name in ("PNG", "WEBP"):
        content = encoded(frames[0], name, save_all=True, append_images=frames[1:])
        yield f"{name} animated", content, "animated"
    pages = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    yield "TIFF of several pages", pages, "several pictures"
    several = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    yield "JPEG of several pictures", several, READ


def _sizes(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes, str]]:
    for name in FORMATS:
        for size in ((1, 1), (1, 5000), (5000, 1)):
            content = encoded(Image.new("RGB", size), name)
            yield f"{name} of {size[0]} x {size[1]} px", content, "shorter side"
    declared = struct.pack(">II", 30_000, 30_000)
    png = whole["PNG"][:16] + declared + whole["PNG"][24:]
    yield "PNG that declares 30000 x 30000 px", png, "not a readable"
    at = whole["JPEG"].index(b"\xff\xc0") + 5
    sides = struct.pack(">HH", 30_000, 30_000)
    jpeg = whole["JPEG"][:at] + sides + whole["JPEG"][at + 4 :]
    yield "JPEG that declares 30000 x 30000 px", jpeg, "declares"
    width = struct.pack("<HHI", 256, 4, 1)  # tag, kind and number of its values
    before, after = whole["TIFF"].split(width)
    tiff = before + width + struct.pack("<I", 30_000) + after[4:]
    yield "TIFF that declares 30000 x 64 px", tiff, "strips are too short"
    flat = Image.new("1", (20_000, 20_000))
    bomb = encoded(flat, "PNG")
    yield "PNG of 20000 x 20000 px in a few bytes", bomb, "declares"
    bomb = encoded(flat, "TIFF", compression="tiff_deflate")
    yield "TIFF that declares 20000 x 20000 px", bomb, "declares"


def _modes() -> Iterator[tuple[str, bytes, str]]:
    image = scene()
    clear = image.convert("RGBA")
    clear.putpixel((3, 3), (0, 0, 0, 254))
    palette = image.convert("P")
    for name, shown, file_format, outcome in (
        ("1", image.convert("1"), "PNG", READ),
        ("L", image.convert("L"), "PNG", READ),
        ("L", image.convert("L"), "JPEG", READ),
        ("LA, opaque", image.convert("LA"), "PNG", READ),
        ("LA, with a clear pixel", clear.convert("LA"), "PNG", "transparent"),
        ("P", palette, "PNG", READ),
        ("RGB", image, "PNG", READ),
        ("RGBA, opaque", image.convert("RGBA"), "PNG", READ),
        ("RGBA, with a clear pixel", clear, "PNG", "transparent"),
        ("RGBA, with a clear pixel", clear, "WEBP", "transparent"),
        ("CMYK", image.convert("CMYK"), "JPEG", "mode CMYK"),
        ("I;16", image.convert("I;16"), "PNG", "16 bits a channel|mode I;16"),
        ("1", image.convert("1"), "TIFF", READ),
        ("L", image.convert("L"), "TIFF", READ),
        ("P", palette, "TIFF", READ),
        ("LA, opaque", image.convert("LA"), "TIFF", "2 bands"),
        ("RGBA, opaque", image.convert("RGBA"), "TIFF", "4 bands"),
        ("RGBX", image.convert("RGBX"), "TIFF", "4 bands"),
        ("CMYK", image.convert("CMYK"), "TIFF", "mode CMYK"),
        ("YCbCr", image.convert("YCbCr"), "TIFF", "mode YCbCr"),
        ("LAB", Image.new("LAB", (72, 64)), "TIFF", "mode LAB"),
        ("I;16", image.convert("I;16"), "TIFF", "16 bits a channel"),
        ("I", image.convert("I"), "TIFF", "signed integers of 32 bits"),
        ("F", image.convert("F"), "TIFF", "floating-point numbers of 32 bits"),
        ("YCbCr", image.convert("YCbCr"), "JPEG", READ),
    ):
        # Only a lossless WebP keeps its clear pixel.
        options = {"lossless": True} if file_format == "WEBP" else {}
        content = encoded(shown, file_format, **options)
        yield f"{file_format} of mode {name}", content, outcome
    hidden = encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))
    yield "PNG of mode P, with a clear colour", hidden, "transparent"


def _orientations() -> Iterator[tuple[str, bytes, str]]:
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for name in FORMATS:
            content = encoded(scene(), name, exif=exif)
            yield f"{name} of EXIF orientation {turn}", content, READ


def _tiffs() -> Iterator[tuple[str, bytes, str]]:
    for name in ("lzw", "deflate", "adobe_deflate"):
        content = encoded(scene(), "TIFF", compression=f"tiff_{name}")
        yield f"TIFF, {name}", content, READ
        for tenths in range(10):
            part = content[: len(content) * tenths // 10]
            yield f"TIFF, {name}, cut after {tenths} tenths", part, BROKEN
    yield "TIFF, packbits", encoded(scene(), "TIFF", compression="packbits"), READ
    predicted = {"compression": "tiff_lzw", "tiffinfo": {317: 2}}
    yield "TIFF, lzw of differences", encoded(scene(), "TIFF", **predicted), READ
    yield "TIFF, BigTIFF", encoded(scene(), "TIFF", big_tiff=True), READ
    jpeg = encoded(scene(), "TIFF", compression="jpeg")
    yield "TIFF, JPEG within", jpeg, "TIFF compression JPEG"
    black = encoded(scene(), "TIFF", tiffinfo={42113: "0"})
    yield "TIFF, no-data value that occurs", black, "without a value"
    clear = encoded(scene(), "TIFF", tiffinfo={42113: "-9999"})
    yield "TIFF, no-data value that does not", clear, READ
