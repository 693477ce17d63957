"""TIFFs: supported layouts are read bit for bit; hidden changes are refused."""

import contextlib
import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xsmae.cli import check_data
from xsmae.data.folder import FolderSource
from xsmae.data.images import decode
from xsmae.errors import BadImageError

RGB = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8) // 8 * 8
LZW, DEFLATE = 5, 8


def encode(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def tiff(tags, parts, *, order="<", tiled=False, more=0):
    """A TIFF of these tags ({tag: values}, 2 or 4 bytes each) and strips or tiles."""
    body, places = b"", []
    for part in parts:
        places.append(8 + len(body) if part else 0)
        body += part
    at, size = (324, 325) if tiled else (273, 279)
    tags = {at: places, size: list(map(len, parts))} | tags
    entries, beyond = b"", b""
    start = 8 + len(body) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        long = max(values) >= 2**16 or tag in (at, size)
        kind, letter = (4, "I") if long else (3, "H")
        data = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(data) > 4:
            beyond, data = beyond + data, struct.pack(order + "I", start + len(beyond))
        entries += struct.pack(order + "HHI", tag, kind, len(values))
        entries += data.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    header = magic + struct.pack(order + "I", 8 + len(body))
    count, after = struct.pack(order + "H", len(tags)), struct.pack(order + "I", more)
    return header + body + count + entries + after + beyond


def tags_of(image, **changes):
    """The tags of an uncompressed RGB image in one strip, with changes."""
    height, width = image.shape[:2]
    tags = {
        "width": (256, [width]),
        "height": (257, [height]),
        "bits": (258, [8, 8, 8]),
        "compression": (259, [1]),
        "colours": (262, [2]),
        "samples": (277, [3]),
        "rows": (278, [height]),
        "planar": (284, [1]),
        "subfile": (254, [0]),
        "extra": (338, None),
        "format": (339, None),
        "tile_width": (322, None),
        "tile_height": (323, None),
    }
    tags |= {name: (tags[name][0], values) for name, values in changes.items()}
    return {tag: values for tag, values in tags.values() if values is not None}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rows", [1, 7, 8, 40, 2**32 - 1])
def test_strips(order, rows):
    each = min(rows, 40)
    parts = [RGB[top : top + each].tobytes() for top in range(0, 40, each)]
    content = tiff(tags_of(RGB, rows=[rows]), parts, order=order)
    np.testing.assert_array_equal(decode(content), RGB)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_tiles(side):
    padded = np.pad(RGB, ((0, -40 % side), (0, -48 % side), (0, 0)))
    parts = [
        padded[top : top + side, left : left + side].tobytes()
        for top in range(0, 40, side)
        for left in range(0, 48, side)
    ]
    tags = tags_of(RGB, rows=None, tile_width=[side], tile_height=[side])
    np.testing.assert_array_equal(decode(tiff(tags, parts, tiled=True)), RGB)


@pytest.mark.parametrize("rows", [7, 40])
def test_bands_one_after_the_other(rows):
    parts = [
        RGB[top : top + rows, :, band].tobytes()
        for band in range(3)
        for top in range(0, 40, rows)
    ]
    content = tiff(tags_of(RGB, planar=[2], rows=[rows]), parts)
    np.testing.assert_array_equal(decode(content), RGB)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_has_the_full_range(bits):
    grey = np.tile(np.arange(48) % 2**bits, (40, 1))
    shown = (grey[:, :, None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(shown.reshape(40, -1).astype(np.uint8), axis=1)
    tags = tags_of(RGB, bits=[bits], colours=[1], samples=[1])
    found = decode(tiff(tags, [packed.tobytes()]))
    expected = grey * 255 // (2**bits - 1)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=-1))


WHOLE = [RGB.tobytes()]


@pytest.mark.parametrize(
    ("changes", "parts", "reason"),
    [
        # Pillow reads these as RGB of 8 bits.
        ({"bits": [16] * 3}, [bytes(2 * RGB.size)], "16 bits a channel"),
        (
            {"bits": [8] * 4, "samples": [4], "extra": [0]},
            [bytes(4 * 40 * 48)],
            "4 bands",
        ),
        ({"rows": [20]}, [WHOLE[0][:5760]], "1 of 2 strips"),
        ({"rows": [20]}, [WHOLE[0][:5760], b""], "pixels are missing"),
        ({"height": [41], "rows": [41]}, WHOLE, "too short"),
        ({"subfile": [1]}, WHOLE, "preview"),
        ({"subfile": [4]}, WHOLE, "mask"),
        # Pillow does not read these.
        ({"format": [2]}, WHOLE, "signed integers of 8 bits"),
        ({"format": [3], "bits": [32] * 3}, [bytes(4 * RGB.size)], "floating-point"),
        ({"bits": [8, 8, 4]}, WHOLE, "bits a channel; expected 8"),
        ({"colours": None}, WHOLE, "no colour space"),
        ({"colours": [32803]}, WHOLE, "colour space 32803"),
        ({"compression": [34712]}, WHOLE, "TIFF compression 34712"),
        ({"width": [0]}, WHOLE, "sizes are damaged"),
        ({"rows": [0]}, WHOLE, "sizes are damaged"),
        ({"planar": [1, 1]}, WHOLE, "tag 284 is damaged"),
        ({"width": None}, WHOLE, "sizes are damaged"),
    ],
)
def test_refused(changes, parts, reason):
    with pytest.raises(BadImageError, match=reason) as caught:
        decode(tiff(tags_of(RGB, **changes), parts))
    assert "\n" not in str(caught.value)


def test_another_page_is_refused():
    assert decode(tiff(tags_of(RGB), WHOLE, more=0)).shape == RGB.shape
    with pytest.raises(BadImageError, match="several pictures"):
        decode(tiff(tags_of(RGB), WHOLE, more=8))


def test_a_tile_is_no_way_round_the_limit_of_pixels():
    tags = tags_of(RGB, rows=None, tile_width=[2**30], tile_height=[2**16])
    tags[259] = [DEFLATE]
    with pytest.raises(BadImageError, match=f"tiles of {2**30} x {2**16} pixels"):
        decode(tiff(tags, [b"x" * 99], tiled=True))


def test_a_value_beyond_the_file_is_not_read():
    content = bytearray(tiff(tags_of(RGB), WHOLE))
    at = content.index(struct.pack("<HHI", 258, 3, 3)) + 4
    content[at : at + 4] = struct.pack("<I", 2**32 - 1)
    with pytest.raises(BadImageError, match="truncated"):
        decode(bytes(content))


@pytest.mark.parametrize("value", ["0", "0.0", " 0 \0"])
def test_pixels_without_a_value_are_refused(value):
    """A pixel has no value if all of its bands are no-data."""
    pixels = np.maximum(RGB, 8)
    pixels[3, 5, :2] = 0
    np.testing.assert_array_equal(
        decode(encode(pixels, tiffinfo={42113: value})), pixels
    )
    pixels[3, 5] = 0
    with pytest.raises(BadImageError, match="without a value"):
        decode(encode(pixels, tiffinfo={42113: value}))
    assert decode(encode(pixels)).shape == RGB.shape
    with pytest.raises(BadImageError, match="no-data value 'none'"):
        decode(encode(pixels, tiffinfo={42113: "none"}))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_what_libtiff_says_is_never_the_only_sign(compression, capfd):
    whole = encode(RGB, compression=compression)
    rng = random.Random(0)
    heard = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(3):
            place = rng.randrange(8 * len(whole))
            content[place // 8] ^= 1 << place % 8
        try:
            decode(bytes(content), max_pixels=10**6)
        except BadImageError:
            heard += bool(capfd.readouterr().err)
        else:
            captured = capfd.readouterr()
            assert captured.err == captured.out == ""
    assert heard or compression == "packbits"


@settings(deadline=None)
@given(
    compression=st.sampled_from(["raw", "tiff_lzw", "tiff_deflate", "packbits"]),
    edits=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 20),
)
def test_damaged_directories(compression, edits, cut):
    """Damage in the first directory, which describes the rest of the file."""
    content = bytearray(encode(RGB, compression=compression))
    (start,) = struct.unpack("<I", content[4:8])
    for position, value in edits:
        content[(start + position - 20) % len(content)] = value
    content = content[: len(content) - cut]
    with contextlib.suppress(BadImageError):
        pixels = decode(bytes(content), min_side=1, max_pixels=100_000)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


def test_a_folder_of_both_spellings(tmp_path, tmp_path_factory, capsys):
    """UC Merced has such file names."""
    for name in ("a/1.tif", "a/2.TIFF", "b/1.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / name, "TIFF", compression="tiff_lzw")
    source = FolderSource(tmp_path, gsd=0.3)
    assert [source.id(i) for i in range(3)] == ["a/1.tif", "a/2.TIFF", "b/1.tif"]
    np.testing.assert_array_equal(source[1].image, RGB)
    (tmp_path / "b/1.tif").write_bytes(encode(RGB)[:99])
    out = tmp_path_factory.mktemp("out")
    flags = [f"--data.root={tmp_path}", "--data.gsd=0.3", f"--out={out}"]
    flags.append("--data.test_fraction=0.5")
    command = ["check-data", "--data=configs/folder.py", *flags]
    assert check_data.main(command) == 0
    said = capsys.readouterr()
    assert "b/1.tif: cannot be decoded: the TIFF is truncated" in said.out
    assert said.err == ""
    assert "Traceback" not in said.out
