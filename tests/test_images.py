"""`decode` converts or refuses each kind of file; the crop around a box."""

import contextlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from xsmae.data.images import crop_with_context, decode
from xsmae.errors import BadImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (40, 48), dtype=np.uint8)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width, height, *, depth, colour, row):
    """A PNG of equal rows, in formats that PIL cannot write."""

    def chunk(kind, data):
        size, checksum = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", size) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_rgb_is_kept(file_format):
    data = encode(Image.fromarray(RGB), file_format, lossless=True)
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, RGB)


def test_jpeg_is_what_pil_decodes():
    data = encode(Image.fromarray(RGB), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data), expected)


def test_path_and_bytes_agree(tmp_path):
    data = encode(Image.fromarray(RGB))
    # The content decides the format, not the name.
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    np.testing.assert_array_equal(decode(path), decode(data))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_grey_is_repeated(file_format):
    pixels = decode(encode(Image.fromarray(GREY), file_format))
    assert pixels.shape == (40, 48, 3)
    assert (pixels == pixels[..., :1]).all()
    if file_format == "PNG":
        np.testing.assert_array_equal(pixels[..., 0], GREY)


def test_black_and_white():
    bits = GREY > 127
    pixels = decode(encode(Image.fromarray(bits)))
    np.testing.assert_array_equal(pixels[..., 1], bits * np.uint8(255))


def test_two_bit_grey_is_scaled_to_the_full_range():
    pixels = decode(png(40, 40, depth=2, colour=0, row=b"\x1b" * 10))
    np.testing.assert_array_equal(pixels[0, :4, 0], [0, 85, 170, 255])


def test_opaque_palette():
    image = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(image)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_left_out(mode):
    image = Image.fromarray(RGB).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(image)), expected)


def test_transparent_colour_that_does_not_occur():
    pixels = np.maximum(RGB, 1)
    data = encode(Image.fromarray(pixels), transparency=(0, 0, 0))
    np.testing.assert_array_equal(decode(data), pixels)


def test_palette_with_opaque_transparency_table():
    image = Image.fromarray(RGB).quantize(16)
    data = encode(image, transparency=b"\xff" * 16)
    assert Image.open(io.BytesIO(data)).has_transparency_data
    np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_one_transparent_pixel_is_refused(mode):
    image = Image.fromarray(RGB).convert(mode)
    alpha = np.full((40, 48), 255, np.uint8)
    alpha[3, 5] = 254
    image.putalpha(Image.fromarray(alpha))
    with pytest.raises(BadImageError, match="alpha down to 254"):
        decode(encode(image))


@pytest.mark.parametrize("image", [RGB, GREY], ids=["RGB", "L"])
def test_transparent_colour_that_occurs_is_refused(image):
    pixels = image.copy()
    pixels[0, 0] = 0
    colour = (0, 0, 0) if pixels.ndim == 3 else 0
    with pytest.raises(BadImageError, match="transparent"):
        decode(encode(Image.fromarray(pixels), transparency=colour))


def test_transparent_palette_is_refused():
    image = Image.fromarray(RGB).quantize(16)
    with pytest.raises(BadImageError, match="transparent"):
        decode(encode(image, transparency=b"\x00" + b"\xff" * 15))


def test_cmyk_is_refused():
    with pytest.raises(BadImageError, match="mode CMYK"):
        decode(encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"))


@pytest.mark.parametrize(
    ("colour", "channels"),
    [(0, 1), (2, 3), (4, 2), (6, 4)],
    ids=["grey", "RGB", "LA", "RGBA"],
)
def test_sixteen_bits_are_refused_even_where_pil_hides_them(colour, channels):
    data = png(40, 40, depth=16, colour=colour, row=b"\x12\x34" * 40 * channels)
    with pytest.raises(BadImageError, match="16 bits"):
        decode(data)


@pytest.mark.parametrize("name", ["image.bmp", "image.png", "image.tif"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(encode(Image.new("RGB", (40, 40)), "BMP"))
    with pytest.raises(BadImageError, match="JPEG, PNG, WebP or TIFF"):
        decode(path)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animated_is_refused(file_format):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImageError, match="2 frames"):
        decode(data)


def test_mpo_gives_its_primary_picture():
    primary, preview = Image.fromarray(RGB), Image.new("RGB", (32, 32))
    data = encode(primary, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    alone = decode(encode(primary, "JPEG"))
    np.testing.assert_array_equal(decode(data), alone)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))],
)
def test_exif_orientation_is_applied(orientation, expected):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_truncated_is_refused(file_format, kept):
    data = encode(Image.fromarray(RGB), file_format)
    with pytest.raises(BadImageError):
        decode(data[: int(kept * len(data))])


def test_jpeg_without_its_last_byte_is_refused():
    with pytest.raises(BadImageError, match="truncated"):
        decode(encode(Image.fromarray(RGB), "JPEG")[:-1])


def test_flipped_bits_in_a_png_are_refused():
    data = bytearray(encode(Image.fromarray(RGB)))
    data[len(data) // 2] ^= 0x40
    with pytest.raises(BadImageError):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "not a readable"),
        (b"\xff\xd8\xff", "not a readable|cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "not a readable|cannot be decoded"),
        (b"II*\x00", "truncated"),
        (b"MM\x00*\x00\x00\x00\x08\xff\xff", "truncated"),
        (b"II+\x00\x04\x00\x00\x00", "BigTIFF"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "not a readable|cannot be decoded"),
        (b"\x00" * 4096, "not a readable"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content, reason):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=reason) as caught:
        decode(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@settings(deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8)
)
def test_nothing_but_bad_image_error_escapes(file_format, edits):
    data = bytearray(encode(Image.new("RGB", (33, 34), (9, 99, 199)), file_format))
    for position, value in edits:
        data[position % len(data)] = value
    with contextlib.suppress(BadImageError):
        pixels = decode(bytes(data), max_pixels=10_000)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


def test_missing_folder_and_pipe_are_refused(tmp_path):
    with pytest.raises(BadImageError, match="does not exist"):
        decode(tmp_path / "none.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        decode(tmp_path / "pipe.png")


def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    with pytest.raises(BadImageError, match="Permission denied"):
        decode(path)


def test_pixels_are_counted_before_they_are_decoded():
    # 20000 x 20000 in 49 kB; PIL refuses it by itself.
    bomb = png(20_000, 20_000, depth=1, colour=0, row=b"\0" * 2500)
    assert len(bomb) < 100_000
    with pytest.raises(BadImageError, match="pixels"):
        decode(bomb)
    # The file is broken after its header, so decode must count from the header.
    large = png(300, 200, depth=8, colour=2, row=b"\0" * 900)[:60]
    said = "300 x 200 pixels, .*max_pixels=59999"
    with pytest.raises(BadImageError, match=said) as caught:
        decode(large, max_pixels=59_999)
    assert "--config.data.max_pixels" in str(caught.value)
    assert "windows" in str(caught.value)


def test_between_pils_warning_and_its_error_max_pixels_decides():
    data = png(10_000, 9_000, depth=1, colour=0, row=b"\0" * 1250)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(BadImageError, match="max_pixels=89478485"):
            decode(data)


def test_side_limit_is_exact():
    data = encode(Image.fromarray(RGB))
    assert decode(data, min_side=40).shape == (40, 48, 3)
    with pytest.raises(BadImageError, match="min_side=41"):
        decode(data, min_side=41)


def test_max_pixels_is_exact():
    data = encode(Image.fromarray(RGB))
    assert decode(data, max_pixels=40 * 48).shape == (40, 48, 3)
    with pytest.raises(BadImageError):
        decode(data, max_pixels=40 * 48 - 1)


def test_crop_with_context():
    crop = crop_with_context(RGB, (10, 12, 20, 8), context=0.25, min_side=1)
    np.testing.assert_array_equal(crop, RGB[10:22, 5:35])
    assert crop.base is None


def test_crop_is_clipped_and_grows_to_min_side():
    corner = crop_with_context(RGB, (40, 30, 20, 20), context=0.5, min_side=1)
    np.testing.assert_array_equal(corner, RGB[20:, 30:])
    small = crop_with_context(RGB, (46, 1, 2, 2), context=0, min_side=16)
    np.testing.assert_array_equal(small, RGB[:16, 32:])


@pytest.mark.parametrize(
    "box",
    [
        (48, 0, 5, 5),
        (0, 40, 5, 5),
        (-5, 0, 5, 5),
        (0, -9, 5, 5),
        (1, 1, 0, 5),
        (1, 1, 5, -1),
        (float("nan"), 0, 5, 5),
        (0, 0, float("inf"), 5),
    ],
)
def test_box_outside_the_image_is_refused(box):
    with pytest.raises(BadImageError, match="in the 48 x 40 image"):
        crop_with_context(RGB, box, context=0.25, min_side=1)


@settings(deadline=None)
@given(
    x=st.floats(0, 47),
    y=st.floats(0, 39),
    width=st.floats(0.1, 60),
    height=st.floats(0.1, 60),
    context=st.floats(0, 2),
    min_side=st.integers(1, 64),
)
def test_crop_covers_the_box_and_is_large_enough(
    x, y, width, height, context, min_side
):
    rows, columns = np.mgrid[:40, :48]
    places = np.stack([rows, columns], -1)
    crop = crop_with_context(
        places, (x, y, width, height), context=context, min_side=min_side
    )
    (top, left), (bottom, right) = crop[0, 0], crop[-1, -1]
    assert left <= x
    assert top <= y
    assert right + 1 >= min(48, x + width)
    assert bottom + 1 >= min(40, y + height)
    assert crop.shape[0] >= min(40, min_side)
    assert crop.shape[1] >= min(48, min_side)
