"""The index of windows: cells, what is left out, the cache, and what is listed."""

import json
import os
import pickle

import numpy as np
import pytest

from tests.support.rasters import REASON, land, north_up, write
from xsmae.data import geotiff
from xsmae.data.geotiff import WindowIndex
from xsmae.data.geotiff_scene import cell_edges
from xsmae.errors import UserError

rasterio = pytest.importorskip("rasterio", reason=REASON)

TILES = {"tiled": True, "blockxsize": 32, "blockysize": 32}


def build(data, **options):
    """The index, and the lines that were said."""
    said = []
    options = {"window": 64, "say": said.append, **options}
    return WindowIndex.build(data, **options), said


@pytest.fixture
def folder(tmp_path):
    """Two rasters of 160 x 128: one whole, one whose left half has no values."""
    root = tmp_path / "scenes"
    (root / "b").mkdir(parents=True)
    write(root / "a.tif", land(160, 128), **TILES)
    data = land(160, 128)
    data[:, :, :64] = 0
    write(root / "b" / "half.TIF", data, nodata=0, **TILES)
    (root / "readme.txt").write_text("no raster")
    (root / ".hidden.tif").write_text("hidden")
    return root


@pytest.mark.parametrize(
    ("length", "side", "block", "expected"),
    [
        (160, 64, 32, [0, 64, 128, 160]),
        (150, 64, 32, [0, 64, 150]),  # a rest of less than half a cell
        (512, 100, 256, [0, 100, 200, 300, 400, 512]),
        (1024, 128, 256, list(range(0, 1025, 128))),
        (300, 512, 8, [0, 300]),
        (1024, 100, 48, [*range(0, 1024, 96), 1024]),
        (1, 512, 1, [0, 1]),
    ],
)
def test_cell_edges(length, side, block, expected):
    assert cell_edges(length, side, block) == expected


def test_windows(folder):
    index, _ = build(folder)
    assert [scene.entry.id for scene in index.scenes] == ["a.tif", "b/half.TIF"]
    assert len(index) == 6 + 3
    assert index.left_out == 3
    assert index.unreadable == 0
    assert index.rejected == {}
    first, last = index[0], index[-1]
    assert first.scene == 0
    assert first.box == (0, 0, 64, 64)
    assert first.gsd == pytest.approx((10.004, 10.004), abs=1e-3)
    assert (last.scene, last.box, last.valid) == (1, (128, 64, 32, 64), 1.0)
    values, valid = index.raster(last.scene).read(last.box)
    assert valid.all()
    assert np.array_equal(
        values, np.moveaxis(land(160, 128), 0, -1)[128:, 64:] / np.float32(255)
    )
    # Every pixel is in one window.
    covered = np.zeros((160, 128), int)
    for window in map(index.__getitem__, range(6)):
        top, left, height, width = window.box
        covered[top : top + height, left : left + width] += 1
    assert (covered == 1).all()
    notes = index.notes()
    assert any("1 .txt" in note for note in notes)
    assert any("3 windows" in note and "50%" in note for note in notes)


def test_min_valid(folder):
    assert len(build(folder, min_valid=0)[0]) == 12
    options = {"min_valid": 0.3, "window": 128}
    index, _ = build(folder / "b" / "half.TIF", **options)
    assert {index[i].valid for i in range(len(index))} == {0.5}
    for bad in ({"min_valid": 1.5}, {"window": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            build(folder, **bad)


def test_the_gsd_of_each_window(tmp_path):
    tall = north_up(10, 60, 0.01)
    path = write(
        tmp_path / "a.tif", land(1024, 64), crs="EPSG:4326", transform=tall, **TILES
    )
    index, _ = build(path)
    along = [index[i].gsd[1] for i in range(len(index))]
    assert len(along) == 16
    for i, gsd in enumerate(along):
        latitude = 60 - 0.01 * (64 * i + 32)
        assert gsd == pytest.approx(1113.2 * np.cos(np.radians(latitude)), rel=3e-3)
    index, _ = build(path, gsd=2)
    assert np.mean([index[i].gsd[0] for i in range(16)]) == pytest.approx(2, rel=0.01)


def test_a_table(folder, tmp_path):
    write(folder / "c.tif", land(64, 64, dtype="float32"), crs=None)
    table = folder / "table.csv"
    table.write_text(
        "path,label,gsd,bands\n"
        "c.tif,river,0.5,nir red green\n"
        "b/half.TIF,field,,\n"
        "a.tif,,3,\n"
    )
    index, _ = build(table)
    entries = [scene.entry for scene in index.scenes]
    assert [entry.id for entry in entries] == ["c.tif", "b/half.TIF", "a.tif"]
    assert [entry.label for entry in entries] == ["river", "field", None]
    assert index.scenes[0].bands == ("nir", "red", "green")
    assert index.scenes[0].gsd == (0.5, 0.5)
    assert index.scenes[1].gsd == pytest.approx((10.004, 10.004), abs=1e-3)
    assert index.scenes[2].gsd == (3, 3)
    assert index.raster(0).bands == ("nir", "red", "green")
    for text, match in (
        ("path\n../a.tif\n", r"line 2.*root"),
        ("path\na.tif\na.tif\n", r"line 3.*line 2"),
        ("path,gsd\na.tif,-1\n", r"line 2.*GSD"),
        ("name\na.tif\n", "path column"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=match):
            build(table)


def test_a_list_and_a_vrt(folder):
    from rasterio.shutil import copy

    paths = [folder / "b" / "half.TIF", str(folder / "a.tif")]
    index, _ = build(paths)
    assert [scene.entry.id for scene in index.scenes] == ["b/half.TIF", "a.tif"]
    with rasterio.Env():
        copy(folder / "a.tif", folder / "a.vrt", driver="VRT")
    index, _ = build(folder / "a.vrt")
    # A VRT's blocks are 128 x 128.
    assert len(index) == 6
    for bad in ([], [paths[0], paths[0]], [*paths, folder / "none.tif"], folder / "x"):
        with pytest.raises(UserError):
            build(bad)


def test_a_gsd_that_is_missing_is_an_error(tmp_path):
    path = write(tmp_path / "a.tif", land(64, 64), crs=None)
    with pytest.raises(UserError, match=r"a\.tif.*gsd="):
        build(tmp_path)
    assert build(path, gsd=0.3)[0][0].gsd == (0.3, 0.3)


def test_damaged_rasters_are_left_out_and_counted(folder):
    whole = (folder / "a.tif").read_bytes()
    (folder / "bad.tif").write_bytes(b"II*\0 nothing")
    write(folder / "block.tif", land(160, 128), nodata=0, compress="deflate", **TILES)
    with rasterio.open(folder / "block.tif") as raster:
        offset = int(raster.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    content = bytearray((folder / "block.tif").read_bytes())
    content[offset : offset + 20] = b"\xff" * 20
    (folder / "block.tif").write_bytes(content)
    index, _ = build(folder)
    assert set(index.rejected) == {"bad.tif"}
    assert index.unreadable == 1  # the cell of that block alone
    assert len(index) == 6 + 3 + 5
    notes = index.notes()
    assert any("1 rasters cannot be used" in note for note in notes)
    assert any("1 windows" in note and "damaged" in note for note in notes)
    (folder / "a.tif").write_bytes(whole[:100])
    (folder / "b" / "half.TIF").unlink()
    (folder / "block.tif").unlink()
    with pytest.raises(UserError, match="none of the 2 rasters"):
        build(folder)


# The cache.


def test_what_is_kept_is_used(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "index.json"
    index, said = build(folder, cache=cache)
    assert "2 of them" in said[-1]
    monkeypatch.setattr(geotiff, "look", None)  # nothing is looked at again
    again, said = build(folder, cache=cache)
    assert "0 of them" in said[-1]
    assert repr(again) == repr(index)
    assert [again[i] for i in range(len(again))] == [index[i] for i in range(9)]
    # Which windows count is not in it.
    assert len(build(folder, cache=cache, min_valid=0)[0]) == 12
    assert os.listdir(cache.parent) == ["index.json"]


def test_a_changed_raster_is_looked_at_again(folder, tmp_path):
    cache = tmp_path / "index.json"
    before, _ = build(folder, cache=cache)
    data = land(160, 128)
    data[:, :64] = 0
    write(folder / "a.tif", data, nodata=0, **TILES)
    os.utime(folder / "a.tif", ns=(1, 1))
    index, said = build(folder, cache=cache)
    assert "1 of them" in said[-1]
    assert len(index) == 4 + 3
    assert index.fingerprint != before.fingerprint
    # A mask beside it counts as well, and so does its removal.
    (folder / "a.tif").unlink()
    mask = np.zeros((160, 128), bool)
    mask[:64, :64] = True
    write(folder / "a.tif", land(160, 128), mask=mask, internal=False, **TILES)
    os.utime(folder / "a.tif", ns=(1, 1))
    assert len(build(folder, cache=cache)[0]) == 1 + 3
    (folder / "a.tif.msk").unlink()
    assert len(build(folder, cache=cache)[0]) == 6 + 3


def test_other_settings_make_another_index(folder, tmp_path):
    cache = tmp_path / "index.json"
    build(folder, cache=cache)
    for options in ({"window": 32}, {"nodata_rule": "any"}, {"scale": 2}):
        _, said = build(folder, cache=cache, **options)
        assert "2 of them" in said[-1]


def test_a_stopped_build_resumes(folder, tmp_path):
    cache = tmp_path / "index.json"
    asked = iter((False, True))
    with pytest.raises(KeyboardInterrupt):
        build(folder, cache=cache, should_stop=lambda: next(asked))
    _, said = build(folder, cache=cache)
    assert "1 of them" in said[-1]


def test_a_damaged_cache_is_made_anew(folder, tmp_path, caplog):
    cache = tmp_path / "index.json"
    index, _ = build(folder, cache=cache)
    text = cache.read_text()
    content = json.loads(text)
    content["rows"]["a.tif"]["shape"] = [1, 1]
    for damaged in (text[: len(text) // 2], "", "[]", json.dumps(content)):
        cache.write_text(damaged)
        caplog.clear()
        again, said = build(folder, cache=cache)
        assert "2 of them" in said[-1]
        assert "damaged" in caplog.text
        assert repr(again) == repr(index)
    with pytest.raises(UserError, match="cannot write"):
        build(folder, cache="/proc/none/index.json")


def test_an_index_can_be_pickled_and_names_no_path(folder):
    index, _ = build(folder)
    index.raster(0)
    again = pickle.loads(pickle.dumps(index))
    assert repr(again) == repr(index)
    assert str(folder) not in repr(index)
    window = again[4]
    assert again.raster(window.scene).read(window.box, size=16)[1].all()


def test_a_moved_folder_is_the_same(folder, tmp_path):
    cache = tmp_path / "index.json"
    index, _ = build(folder, cache=cache)
    folder.rename(tmp_path / "elsewhere")
    again, said = build(tmp_path / "elsewhere", cache=cache)
    assert "0 of them" in said[-1]
    assert again.fingerprint == index.fingerprint
    assert again.raster(0).shape == (160, 128)
