"""Damaged and hostile rasters: each has a decided outcome, in one line."""

import contextlib
import http.server
import struct
import threading

import numpy as np
import pytest

from tests.support.rasters import REASON, land, north_up, write
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError

rasterio = pytest.importorskip("rasterio", reason=REASON)

TILES = {"tiled": True, "blockxsize": 32, "blockysize": 32}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "raster.tif"


def noise(seed=0):
    return np.random.default_rng(seed).integers(1, 256, (3, 96, 96), dtype=np.uint8)


def refused(path, **options):
    """The line for which a raster is refused, when it is opened or when it is read."""
    with (
        pytest.raises(BadImageError) as caught,
        open_raster(path, **options) as raster,
    ):
        raster.read((0, 0, *raster.shape))
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("tenths", range(10))
def test_truncated(path, compress, tenths):
    data = noise()
    content = write(path, data, compress=compress, **TILES).read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])
    refused(path)


@pytest.mark.parametrize("big", ["NO", "YES"])
@pytest.mark.parametrize("overviews", [(), (2, 4)])
def test_truncated_where_the_mask_is(path, overviews, big):
    """What is read is right, or there is an error.

    GDAL reads a file whose last directory is missing as one that never had a mask.
    """
    data = noise()
    mask = data[0] > 100
    options = {"compress": "deflate", "bigtiff": big, **TILES}
    write(path, data, mask=mask, overviews=overviews, **options)
    content, refused_at = path.read_bytes(), 0
    lengths = [*range(0, len(content), len(content) // 60)]
    for length in lengths:
        path.write_bytes(content[:length])
        try:
            with open_raster(path) as raster:
                values, valid = raster.read((0, 0, 96, 96))
        except BadImageError:
            refused_at += 1
            continue
        assert np.array_equal(valid, mask)
        whole = np.moveaxis(data, 0, -1) / np.float32(255)
        assert np.array_equal(values[mask], whole[mask])
    assert refused_at > len(lengths) / 2


@pytest.mark.parametrize("compress", ["deflate", "lzw"])
def test_a_corrupt_block_spoils_its_windows_alone(path, compress):
    data = noise()
    write(path, data, compress=compress, **TILES)
    content = bytearray(path.read_bytes())
    with rasterio.open(path) as raster:
        # The tile in the middle; GDAL tells where its bytes are.
        offset = int(raster.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
        size = int(raster.get_tag_item("BLOCK_SIZE_1_1", "TIFF", bidx=1))
    content[offset + size // 3 : offset + size // 2] = b"\xff" * (size // 2 - size // 3)
    path.write_bytes(content)
    with open_raster(path) as raster:
        with pytest.raises(BadImageError, match=r"raster\.tif"):
            raster.read((40, 40, 8, 8))
        values, valid = raster.read((0, 0, 32, 96))
        assert valid.all()
        expected = np.moveaxis(data, 0, -1)[:32] / np.float32(255)
        assert np.array_equal(values, expected)


def test_not_a_raster(path):
    for content in (b"", b"II*\0", b"nothing of the kind" * 9):
        path.write_bytes(content)
        assert "not recognized" in refused(path) or "header" in refused(path)
    path.unlink()
    with pytest.raises(UserError, match=r"raster\.tif does not exist"):
        open_raster(path)
    path.mkdir()
    refused(path)


def test_a_mask_that_is_damaged_or_of_another_size(path):
    mask = noise()[0] > 100
    write(path, noise(), mask=mask, internal=False)
    beside = path.with_name("raster.tif.msk")
    good = beside.read_bytes()
    write(path.with_name("other.tif"), noise()[:1, :40, :50])
    beside.write_bytes(path.with_name("other.tif").read_bytes())
    assert "40 x 50" in refused(path)
    # GDAL passes over this one without a word.
    beside.write_bytes(b"garbage")
    assert "raster.tif.msk" in refused(path)
    for length in range(0, len(good), len(good) // 50):
        beside.write_bytes(good[:length])
        with contextlib.suppress(BadImageError), open_raster(path) as raster:
            assert np.array_equal(raster.read((0, 0, 96, 96))[1], mask)
    beside.write_bytes(good)
    assert open_raster(path).valid_fraction() == mask.mean()


def bomb(side, *, tile=False):
    """A TIFF of 208 bytes that declares side x side pixels of 8 bits, in one block."""
    tags = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 8),
        (262, 3, 1, 1), (277, 3, 1, 1),
    ]  # fmt: skip
    if tile:
        tags += [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 200), (325, 4, 1, 8)]
    else:
        tags += [(273, 4, 1, 200), (278, 4, 1, side), (279, 4, 1, 8)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + bytes(8)


def test_a_bomb(path):
    path.write_bytes(bomb(100_000))
    line = refused(path)
    assert "100000 x 100000 pixels" in line
    assert "208 bytes" in line
    # A size that a file could have, but in one block, which is decoded as a whole.
    path.write_bytes(bomb(30_000 - 30_000 % 16, tile=True))
    assert "858 MiB" in refused(path)
    # In small blocks.
    with rasterio.open(
        path, "w", driver="GTiff", width=100_000, height=100_000, count=1,
        dtype="uint8", compress="deflate", sparse_ok=True, tiled=True, blockxsize=1024,
        blockysize=1024, crs="EPSG:32633",
        transform=rasterio.Affine(*north_up(5e5, 5e6, 1)),
    ):  # fmt: skip
        pass
    assert "9 GiB" in refused(path)


def test_a_large_sparse_raster_is_read_by_windows(path):
    with rasterio.open(
        path, "w", driver="GTiff", width=20_000, height=20_000, count=1,
        dtype="uint8", compress="deflate", sparse_ok=True, **TILES, crs="EPSG:32633",
        transform=rasterio.Affine(*north_up(5e5, 5e6, 1)),
    ) as raster:  # fmt: skip
        raster.write(
            land(32, 32, bands=1), window=rasterio.windows.Window(0, 0, 32, 32)
        )
    with open_raster(path) as raster:
        values, valid = raster.read((0, 0, 64, 64))
        assert valid.all()
        assert values[:32, :32].all()
        assert not values[32:].any()


@pytest.fixture
def server():
    """The URL of a server that has nothing, and what it was asked for."""
    asked = []

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("prefix", ["/vsicurl/", ""])
def test_a_404(server, prefix):
    url, asked = server
    with pytest.raises(BadImageError, match="404") as caught:
        open_raster(f"{prefix}{url}/missing.tif")
    assert "\n" not in str(caught.value)
    assert {*asked} == {"/missing.tif"}  # no sidecars, no listing


def test_nobody_listens():
    with pytest.raises(BadImageError, match=r"127\.0\.0\.1"):
        open_raster("/vsicurl/http://127.0.0.1:9/missing.tif")


def test_bytes_at_random(path):
    """Whatever is changed in a file: it is read, or there is one of our errors."""
    data = noise()
    write(path, data, mask=data[0] > 100, overviews=(2,), compress="deflate", **TILES)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    read, lines = 0, []
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, 1500, rng.integers(1, 4)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            with open_raster(path) as raster:
                assert 0 <= raster.valid_fraction() <= 1
                values, _ = raster.read((0, 0, 64, 64), size=16)
                assert np.isfinite(values).all()
            read += 1
        except (BadImageError, UserError) as error:
            lines.append(str(error))
    assert min(read, len(lines)) > 10
    assert not [line for line in lines if "\n" in line]
