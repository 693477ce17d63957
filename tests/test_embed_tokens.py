"""Vectors of the patches of scenes: the grid, the file, kills, and what is refused."""

import json

import numpy as np
import pytest

from tests.support.encoders import make_encoder
from tests.support.rasters import REASON, UTM
from tests.support.scenes import (
    CHIP,
    Killed,
    call,
    contents,
    loaded,
    make_scene,
    run_killed,
)
from xsmae.cli import embed_scenes
from xsmae.data.raster import open_raster
from xsmae.scenes import strips
from xsmae.scenes.encoding import Groups
from xsmae.scenes.tokens import owned
from xsmae.weights.encoder import load_encoder

rasterio = pytest.importorskip("rasterio", reason=REASON)

PATCH = 4
HEIGHT, WIDTH = 42, 51  # 11 x 13 patches, the last ones partly outside


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder, depth=1, position="gsd", reference_gsd=10.0)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(embed_scenes, "load_encoder", loaded)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return make_scene(folder / "scene.tif", HEIGHT, WIDTH)


def brute_force(folder, scene, stride):
    """Each patch, of the window whose centre is nearest along both axes."""
    encoder = load_encoder(folder)
    with open_raster(scene) as raster:
        values, valid = raster.read(
            (0, 0, 11 * PATCH, 13 * PATCH), bands=encoder.bands.names
        )
        gsd = raster.gsd
    values = np.where(valid[..., None], values, np.float32(encoder.bands.mean))
    share = valid.reshape(11, PATCH, 13, PATCH).mean(axis=(1, 3))
    starts = [[*range(0, n * PATCH - CHIP, stride), n * PATCH - CHIP] for n in (11, 13)]
    found = np.full((11, 13, 16), np.nan, np.float32)
    for i, j in np.argwhere(share >= 0.5):
        place = []
        for patch, axis in ((i, starts[0]), (j, starts[1])):
            middle = PATCH * patch + PATCH / 2
            # Of two windows at the same distance, the first one ends before the patch.
            away = [(abs(s + CHIP / 2 - middle), -s) for s in axis]
            place.append(axis[away.index(min(away))])
        top, left = place
        image = values[top : top + CHIP, left : left + CHIP]
        tokens = encoder.tokens(image[None], gsd=[gsd])[0, 1:].reshape(4, 4, 16)
        found[i, j] = tokens[i - top // PATCH, j - left // PATCH]
    return found


@pytest.mark.parametrize("stride", [16, 8])
def test_the_grid_equals_brute_force(tmp_path, encoder, scene, stride):
    out = tmp_path / "out"
    words = [scene, f"--encoder={encoder}", "--chip_size=16", f"--stride={stride}"]
    assert call(*words, "--unit=token", "--format=cog", f"--out={out}") == 0
    assert set(contents(out)) == {"scene.tif", "scene.json", "manifest.json"}
    expected = brute_force(encoder, scene, stride)
    with rasterio.open(out / "scene.tif") as got:
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert np.isnan(got.nodata)
        assert got.transform.almost_equals(
            rasterio.Affine(UTM[0] * PATCH, 0, UTM[2], 0, UTM[4] * PATCH, UTM[5])
        )
        assert got.crs.to_epsg() == 32633
        assert got.block_shapes[0] == (512, 512)
        found = got.read().transpose(1, 2, 0)
        told = json.loads(got.tags()["EMB"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    missing = np.isnan(expected[..., 0])
    assert 0 < missing.sum() < missing.size / 2
    assert (told["emb:type"], told["emb:dimensions"]) == ("pixel", 16)
    item = json.loads((out / "scene.json").read_text())
    assert item["assets"]["embeddings"]["href"] == "./scene.tif"
    rows = json.loads((out / "manifest.json").read_text())["scenes"]["scene"]["rows"]
    assert rows == (~missing).sum()


def test_int8_has_a_scale_for_each_band(tmp_path, encoder, scene):
    words = [scene, f"--encoder={encoder}", "--chip_size=16", "--unit=token"]
    for dtype in ("float32", "int8"):
        assert call(*words, f"--dtype={dtype}", f"--out={tmp_path / dtype}") == 0
    with rasterio.open(tmp_path / "float32" / "scene.tif") as got:
        exact = got.read()
    with rasterio.open(tmp_path / "int8" / "scene.tif") as got:
        assert got.nodata == -128
        scales = np.array(got.scales)
        numbers = got.read()
    np.testing.assert_array_equal(numbers == -128, np.isnan(exact))
    near = np.where(numbers == -128, np.nan, numbers * scales[:, None, None])
    greatest = np.nanmax(np.abs(exact), axis=(1, 2))
    assert scales == pytest.approx(greatest / 127)
    assert (np.nanmax(np.abs(near - exact), axis=(1, 2)) <= greatest / 253).all()


def test_killed_and_resumed(tmp_path, encoder, scene, monkeypatch):
    words = ["--unit=token", "--stride=8"]
    commit, sent = (strips, "write_json"), (Groups, "_send")
    out = tmp_path / "whole"
    whole = run_killed(monkeypatch, encoder, scene, out, sent, 0, *words)
    expected = contents(out)
    for number in (1, 2, 4):
        out = tmp_path / str(number)
        with pytest.raises(Killed):
            run_killed(monkeypatch, encoder, scene, out, commit, number, *words)
        again = run_killed(monkeypatch, encoder, scene, out, sent, 0, *words)
        assert contents(out) == expected
        assert again < whole or number == 1
    # The tables of chips have other files: those of patches stay.
    assert call(scene, f"--encoder={encoder}", "--chip_size=16", f"--out={out}") == 3
    assert contents(out)["scene.tif"] == expected["scene.tif"]


def test_what_does_not_fit_is_refused(tmp_path, encoder, scene, capsys):
    first = [scene, f"--encoder={encoder}", f"--out={tmp_path}/out", "--unit=token"]
    for words, status, match in (
        (["--format=parquet"], 2, "--format=cog"),
        (["--size=16"], 2, "--size"),
        (["--pooling=cls"], 2, "--pooling"),
        (["--dtype=float16"], 2, "float16"),
        (["--chip_size=500m"], 3, "500m"),
        (["--chip_size=18"], 3, "18"),
        (["--chip_size=16", "--stride=6"], 3, "patch size 4"),
        (["--chip_size=16", "--stride=20"], 3, "20"),
        (["--chip_size=64"], 3, "42 x 51"),
        (["--chip_size=16", "--min_valid=1", "--bands=red,green"], 3, "blue"),
    ):
        assert call(*first, *words) == status
        said = capsys.readouterr()
        assert match in said.out + said.err


def test_each_patch_has_one_owner():
    assert owned((0, 16, 28), 16, 4) == [0, 4, 7, 11]
    assert owned((0, 8, 16), 16, 4) == [0, 3, 5, 8]
    assert owned((0,), 16, 4) == [0, 4]
