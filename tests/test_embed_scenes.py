"""Embeddings of scenes: the vectors, the files, kills, shards, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest

import xsmae
from tests.support.devices import run_on_devices
from tests.support.encoders import make_encoder
from tests.support.rasters import REASON, land, north_up, write
from tests.support.scenes import (
    CHIP,
    Killed,
    call,
    contents,
    loaded,
    make_scene,
    run_killed,
)
from xsmae.cli import embed as command
from xsmae.cli import embed_scenes
from xsmae.data.raster import open_raster
from xsmae.errors import UserError
from xsmae.scenes import embed, encoding, manifest, strips
from xsmae.scenes.chips import Length, panel_shape, panels, plan_grid
from xsmae.scenes.embed import Chips, Plan
from xsmae.scenes.encoding import Groups
from xsmae.scenes.manifest import Manifest
from xsmae.scenes.quantize import quantize, recall
from xsmae.scenes.rows import encoded
from xsmae.weights.encoder import load_encoder

rasterio = pytest.importorskip("rasterio", reason=REASON)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder, depth=1, position="gsd", reference_gsd=10.0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scenes") / "scene.tif")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART", 9)  # of two rows of chips
    monkeypatch.setattr(embed_scenes, "load_encoder", loaded)


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def footer_of(path):
    return json.loads(pyarrow.parquet.read_metadata(path).metadata[b"emb"])


def check_rows(path, scene, encoder, *, size=CHIP, pooling="mean", **options):
    """Each vector, beside `load_encoder` on the window of its row."""
    encoder = load_encoder(encoder)
    rows = rows_of(path)
    bands = encoder.bands
    with open_raster(scene, **options) as raster:
        for row in rows:
            window = (row["row"], row["col"], row["height"], row["width"])
            side = None if (row["height"], row["width"]) == (size, size) else size
            values, valid = raster.read(window, side, bands=bands.names)
            values = np.where(valid[..., None], values, np.float32(bands.mean))
            gsd = [[row["gsd_y"], row["gsd_x"]]]
            vector = encoder(values[None], gsd=gsd, pooling=pooling)[0]
            found = np.array(row["embedding"], float) * row.get("scale", 1)
            np.testing.assert_allclose(found, vector, rtol=0, atol=1e-5)
            assert row["valid_fraction"] == pytest.approx(valid.mean())
    return rows


def test_each_vector_is_that_of_its_window(tmp_path, encoder, scene, capsys):
    out = tmp_path / "out"
    words = [scene, f"--encoder={encoder}", f"--out={out}"]
    assert call(*words, "--chip_size=16") == 0
    rows = check_rows(out / "scene.parquet", scene, encoder)
    # 6 x 5 chips; those of the hole have too few valid pixels.
    left_out = [(r, c) for r in (0, 16, 32) for c in (0, 16)]
    places = {(row["row"], row["col"]) for row in rows}
    tops, lefts = (0, 16, 32, 48, 64, 74), (0, 16, 32, 48, 54)
    wanted = {(top, left) for top in tops for left in lefts}
    assert wanted - places <= set(left_out)
    assert {(0, 0), (16, 0)} <= wanted - places
    assert {row["source"] for row in rows} == {str(scene)}
    assert rows[0]["crs"] == "EPSG:32633"
    assert "30 chips" not in capsys.readouterr().out
    entry = json.loads((out / "manifest.json").read_text())
    assert entry["wanted"] == ["scene"]
    assert entry["scenes"]["scene"]["rows"] == len(rows)
    names = {"scene.parquet", "scene.json", "manifest.json"}
    assert {p.name for p in out.iterdir()} == names
    before = contents(out)
    assert call(*words, "--chip_size=16") == 0
    assert "were there" in capsys.readouterr().out
    assert contents(out) == before
    content = footer_of(out / "scene.parquet")
    assert content["emb:type"] == "chip"
    assert content["emb:dimensions"] == 16
    assert content["data_type"] == "float32"
    assert content["emb:chip_layout"]["stride"] == [16, 16]
    assert content["model"]["digest"] == load_encoder(encoder).digest


def test_overlap_pooling_metres_and_size(tmp_path, encoder, scene):
    shared = [scene, f"--encoder={encoder}", "--pooling=cls", "--min_valid=0.9"]
    out = tmp_path / "pixels"
    assert call(*shared, f"--out={out}", "--chip_size=24", "--stride=7") == 0
    rows = check_rows(out / "scene.parquet", scene, encoder, size=24, pooling="cls")
    assert min(row["valid_fraction"] for row in rows) >= 0.9
    assert {row["row"] for row in rows} == {*range(0, 66, 7), 66}
    # Chips of 300 m have 30 pixels; the encoder gets 16, its own size.
    out = tmp_path / "metres"
    assert call(*shared, f"--out={out}", "--chip_size=300m", "--stride=200m") == 0
    rows = check_rows(out / "scene.parquet", scene, encoder, pooling="cls")
    assert {(row["height"], row["width"]) for row in rows} == {(30, 30)}
    assert rows[0]["gsd_x"] == pytest.approx(10 * 30 / 16, rel=0.01)
    assert footer_of(out / "scene.parquet")["emb:runtime_parameters"]["size"] == [
        16,
        16,
    ]
    out = tmp_path / "size"
    words = ["--chip_size=20", "--size=8"]
    assert call(*shared, f"--out={out}", *words) == 0
    check_rows(out / "scene.parquet", scene, encoder, size=8, pooling="cls")


def test_the_item(tmp_path, encoder):
    place = {"crs": "EPSG:4326", "transform": north_up(179.5, -16, 0.01)}
    path = make_scene(tmp_path / "in" / "far.tif", 64, 96, **place)
    out = tmp_path / "out"
    words = [path, f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
    assert call(*words, "--datetime=2020-02-03T04:05:06Z") == 0
    item = json.loads((out / "far.json").read_text())
    assert (item["type"], item["stac_version"], item["id"]) == (
        "Feature",
        "1.1.0",
        "far",
    )
    assert item["geometry"]["type"] == "MultiPolygon"
    assert item["bbox"] == pytest.approx([179.5, -16.64, -179.54, -16])
    told = item["properties"]
    assert told["datetime"] == "2020-02-03T04:05:06Z"
    assert (told["emb:type"], told["emb:dimensions"]) == ("chip", 16)
    assert (told["proj:code"], told["proj:shape"]) == ("EPSG:4326", [64, 96])
    links = {link["rel"]: out / link["href"] for link in item["links"]}
    assert links["emb:source-data"].samefile(path)
    assert links["emb:model"].samefile(encoder)
    asset = item["assets"]["embeddings"]
    assert (out / asset["href"]).is_file()
    assert asset["type"] == "application/vnd.apache.parquet"


def test_each_window_gets_its_own_gsd(tmp_path, encoder):
    place = {"crs": "EPSG:4326", "transform": north_up(10, 65, 0.01)}
    path = make_scene(tmp_path / "degrees.tif", 480, 32, **place)
    out = tmp_path / "out"
    assert call(path, f"--encoder={encoder}", f"--out={out}", "--chip_size=16") == 0
    rows = {
        row["row"]: row for row in check_rows(out / "degrees.parquet", path, encoder)
    }
    for top in (64, 464):
        wide = 0.01 * 111_320 * np.cos(np.radians(65 - 0.01 * (top + 8)))
        assert rows[top]["gsd_x"] == pytest.approx(wide, rel=0.01)
    assert rows[464]["gsd_x"] > 1.05 * rows[64]["gsd_x"]


def test_bands_are_found_by_name_and_units_are_checked(tmp_path, encoder, capsys):
    data = land(40, 40, bands=4)
    names = ("nir", "blue", "green", "red")
    mixed = write(tmp_path / "mixed.tif", data, descriptions=names)
    plain = write(tmp_path / "plain.tif", data[[3, 2, 1]], photometric="rgb")
    unnamed = write(tmp_path / "unnamed.tif", data[1:])
    sixteen = write(tmp_path / "sixteen.tif", data.astype("uint16"), descriptions=names)
    out = tmp_path / "out"
    words = [mixed, plain, unnamed, sixteen, f"--encoder={encoder}", f"--out={out}"]
    assert call(*words, "--datetime=2020-02-03") == 3
    said = capsys.readouterr().out
    assert "--bands" in said
    assert "16 without a scale" in said
    found = [rows_of(out / f"{name}.parquet") for name in ("mixed", "plain")]
    for a, b in zip(*found, strict=True):
        assert a["embedding"] == b["embedding"]
        assert a["datetime"].isoformat() == "2020-02-03T00:00:00+00:00"
    failed = json.loads((out / "manifest.json").read_text())["failed"]
    assert failed.keys() == {"unnamed", "sixteen"}
    scaled = [sixteen, f"--encoder={encoder}", f"--out={out}", "--scale=0.01"]
    assert call(*scaled) == 3
    assert "uint16" in capsys.readouterr().out


def test_the_time_of_a_file(tmp_path, encoder):
    path = make_scene(tmp_path / "timed.tif", 60, 40)
    out = tmp_path / "out"
    words = [path, f"--encoder={encoder}", "--chip_size=16"]
    assert call(*words, f"--out={out}") == 0
    assert (
        str(rows_of(out / "timed.parquet")[0]["datetime"])[:19] == "2019-09-04 10:20:30"
    )
    item = json.loads((out / "timed.json").read_text())
    assert item["properties"]["datetime"] == "2019-09-04T10:20:30Z"


def test_an_interval_is_in_the_item(tmp_path, encoder, capsys):
    path = make_scene(tmp_path / "summer.tif", 60, 40)
    words = [path, f"--encoder={encoder}", f"--out={tmp_path}/out", "--chip_size=16"]
    assert call(*words, "--datetime=2020-06-01T02:00+02:00/2020-08-31") == 0
    item = json.loads((tmp_path / "out" / "summer.json").read_text())
    told = item["properties"]
    assert told["datetime"] is None
    assert told["start_datetime"] == "2020-06-01T00:00:00Z"
    assert told["end_datetime"] == "2020-08-31T23:59:59Z"
    for row in rows_of(tmp_path / "out" / "summer.parquet"):
        assert row["datetime"].isoformat() == "2020-06-01T00:00:00+00:00"
    # Another end is another job; the same interval in other words is not.
    capsys.readouterr()
    same = "--datetime=2020-06-01/2020-08-31T23:59:59Z"
    assert call(*words, same) == 0
    assert "were there" in capsys.readouterr().out
    assert call(*words, "--datetime=2020-06-01/2020-09-30") == 3


@pytest.mark.parametrize(("unit", "suffix"), [("chip", "parquet"), ("token", "tif")])
def test_without_a_time_there_is_no_item(tmp_path, encoder, capsys, unit, suffix):
    timed = make_scene(tmp_path / "timed.tif", 60, 40)
    never = make_scene(tmp_path / "never.tif", 60, 40, tags={})
    shared = [timed, never, f"--encoder={encoder}", "--chip_size=16", f"--unit={unit}"]
    out = tmp_path / "out"
    assert call(*shared, f"--out={out}") == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if "STAC" in line)
    assert line.startswith(f"{never}: ")
    assert "--datetime" in line
    expected = contents(out)
    assert expected.keys() == {
        f"timed.{suffix}", "timed.json", f"never.{suffix}", "manifest.json",
    }  # fmt: skip
    listed = json.loads(expected["manifest.json"])["scenes"]
    assert listed["never"]["files"].keys() == {f"never.{suffix}"}
    assert listed["timed"]["files"].keys() == {f"timed.{suffix}", "timed.json"}
    assert call(*shared, f"--out={out}") == 0
    assert capsys.readouterr().out.count("were there") == 2
    (out / "manifest.json").unlink()
    assert call(*shared, f"--out={out}") == 0
    assert contents(out) == expected
    for i in range(2):
        assert call(*shared, f"--out={tmp_path}/parts", f"--shard={i}/2") == 0
    assert call("--merge", f"--out={tmp_path}/parts") == 0
    assert contents(tmp_path / "parts") == expected


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_numbers(tmp_path, encoder, scene, dtype, capsys):
    shared = [scene, f"--encoder={encoder}", "--chip_size=16"]
    for kind in ("float32", dtype):
        assert call(*shared, f"--out={tmp_path / kind}", f"--dtype={kind}") == 0
    said = capsys.readouterr().out
    exact, found = (rows_of(tmp_path / k / "scene.parquet") for k in ("float32", dtype))
    assert [row["id"] for row in exact] == [row["id"] for row in found]
    vectors = np.array([row["embedding"] for row in exact])
    near = np.array([np.array(r["embedding"]) * r.get("scale", 1) for r in found])
    greatest = np.abs(vectors).max(axis=1, keepdims=True)
    assert (
        np.abs(near - vectors) <= greatest / (254 if dtype == "int8" else 1000)
    ).all()
    told = footer_of(tmp_path / dtype / "scene.parquet")["emb:quantization"]
    assert told["quantized_dtype"] == dtype
    if dtype == "int8":
        expected = recall(vectors, near)
        assert 0.5 < told["recall_at_10"] <= 1
        assert told["recall_at_10"] == pytest.approx(expected, abs=1e-4)
        assert f"{told['recall_at_10']:.1%}" in said


def test_quantization_and_its_recall():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 32)).astype(np.float32)
    vectors[7] = 0
    numbers, scale = quantize(vectors)
    assert np.abs(numbers[8]).max() == 127
    assert not numbers[7].any()
    np.testing.assert_allclose(
        numbers * scale[:, None], vectors, atol=1.01 * scale.max() / 2
    )
    assert recall(vectors, vectors) == 1
    assert recall(vectors, rng.normal(size=(300, 32))) < 0.1
    assert recall(vectors[:1], vectors[:1]) is None


def test_batches_and_devices_change_no_byte(tmp_path, encoder, scene):
    found = {}
    for number, (devices, batch) in enumerate([(1, 1), (1, 100), (3, 40)]):
        folder = tmp_path / str(number)
        words = [str(scene), str(encoder), str(folder), str(batch)]
        run_on_devices("tests.support.embed_on_devices", devices, *words)
        found[devices, batch] = contents(folder)
    assert all(other == found[1, 1] for other in found.values())
    assert len(found[1, 1]) == 3


def test_from_python(tmp_path, encoder, scene):
    words = [scene, f"--encoder={encoder}", "--chip_size=16", "--stride=160m"]
    assert call(*words, f"--out={tmp_path / 'out'}") == 0
    found = xsmae.embed(encoder, scene, chip_size=16, stride="160m")
    assert found.vectors.shape == (6, 5, 16)
    rows = rows_of(tmp_path / "out" / "scene.parquet")
    kept = np.isfinite(found.vectors).all(axis=-1)
    assert kept.sum() == len(rows)
    for row in rows:
        place = (
            np.searchsorted(found.tops, row["row"]),
            np.searchsorted(found.lefts, row["col"]),
        )
        np.testing.assert_array_equal(found.vectors[place], row["embedding"])
        assert found.valid[place] == row["valid_fraction"]
        assert tuple(found.gsd[place]) == (row["gsd_y"], row["gsd_x"])
    with open_raster(scene) as raster:
        again = xsmae.embed(load_encoder(encoder), raster, chip_size=16)
        np.testing.assert_array_equal(again.vectors, found.vectors)
        assert again.transform.c + again.transform.a * again.lefts[1] == 500_160
        assert again.transform.f + again.transform.e * again.tops[2] == 4_999_680
        with pytest.raises(UserError, match="sensor"):
            xsmae.embed(encoder, raster, sensor="naip")
    with pytest.raises(UserError, match="chip_size=-3"):
        xsmae.embed(encoder, scene, chip_size=-3)


def test_as_xarray(tmp_path, encoder, scene):
    xarray = pytest.importorskip("xarray")
    found = xsmae.embed(encoder, scene, chip_size=16)
    array = found.to_xarray()
    assert isinstance(array, xarray.DataArray)
    assert dict(array.sizes) == {"row": 6, "col": 5, "feature": 16}
    np.testing.assert_array_equal(array.values, found.vectors)
    left_out = array.isnull().all("feature")
    np.testing.assert_array_equal(left_out, found.valid < 0.5)
    assert 0 < int(left_out.sum()) < 30
    assert array.row.values.tolist() == [0, 16, 32, 48, 64, 74]
    assert array.col.values.tolist() == [0, 16, 32, 48, 54]
    np.testing.assert_array_equal(array.valid_fraction, found.valid)
    # Pixels have 10 m; the last chip of each axis is moved back.
    assert array.x.dims == ("col",)
    assert array.x.values.tolist() == [500_000 + 10 * (c + 8) for c in array.col.values]
    assert array.y.dims == ("row",)
    assert array.y.values.tolist() == [5e6 - 10 * (r + 8) for r in array.row.values]
    assert array.attrs == {
        "crs": "EPSG:32633",
        "transform": (10, 0, 500_000, 0, -10, 5_000_000),
        "chip_size": (16, 16),
    }
    near = array.swap_dims(row="y", col="x").sel(
        x=500_200, y=4_999_000, method="nearest"
    )
    np.testing.assert_array_equal(near, found.vectors[5, 1])


def test_as_xarray_where_the_grid_is_rotated_or_has_no_crs(tmp_path, encoder):
    pytest.importorskip("xarray")
    turned = (8.0, 3.0, 500_000.0, 3.0, -8.0, 5_000_000.0)
    path = make_scene(tmp_path / "turned.tif", 48, 32, transform=turned)
    array = xsmae.embed(encoder, path, chip_size=16).to_xarray()
    assert array.x.dims == array.y.dims == ("row", "col")
    assert float(array.x[2, 1]) == 8 * 24 + 3 * 40 + 500_000
    assert float(array.y[2, 1]) == 3 * 24 - 8 * 40 + 5_000_000
    path = make_scene(tmp_path / "nowhere.tif", 48, 32, crs=None)
    array = xsmae.embed(encoder, path, chip_size=16, gsd=10.0).to_xarray()
    assert {"x", "y"}.isdisjoint(array.coords)
    assert "crs" not in array.attrs


def test_without_xarray_the_message_says_how_to_install_it(encoder, scene, monkeypatch):
    found = xsmae.embed(encoder, scene, chip_size=16)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(UserError, match="pip install xarray") as raised:
        found.to_xarray()
    assert "\n" not in str(raised.value)


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    tmp_path, encoder, scene, monkeypatch
):
    commit, listing = (strips, "write_json"), (manifest, "write_json")
    table, sent = (embed, "write_chips"), (encoding.Groups, "_send")
    whole = run_killed(monkeypatch, encoder, scene, tmp_path / "whole", sent, 0)
    expected = contents(tmp_path / "whole")
    for number, place in [
        (1, commit), (2, commit), (3, commit), (2, listing), (1, table), (2, sent),
    ]:  # fmt: skip
        out = tmp_path / f"{place[1]}_{number}_{place[0].__name__}"
        with pytest.raises(Killed):
            run_killed(monkeypatch, encoder, scene, out, place, number)
        again = run_killed(monkeypatch, encoder, scene, out, sent, 0)
        assert contents(out) == expected
        if place in (table, listing):
            assert again == 0  # all vectors were there
        elif place == commit and number > 1:
            assert 0 < again < whole


KILLED = """
import os, signal, sys
from xsmae import cli
from xsmae.scenes import embed, strips

calls, write = [], strips.write_json
embed.PART = 9

def killed(*args):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)

strips.write_json = killed
cli.main(["xsmae", "embed", *sys.argv[1:]])
"""


def test_sigkill(tmp_path, encoder, scene):
    words = [str(scene), f"--encoder={encoder}", "--chip_size=16"]
    killed = [sys.executable, "-c", KILLED, *words, f"--out={tmp_path}/out"]
    assert subprocess.run(killed).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "scene.parquet").exists()
    assert call(*words, f"--out={tmp_path}/out") == 0
    assert call(*words, f"--out={tmp_path}/whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_command_that_is_asked_to_stop_resumes(tmp_path, encoder, scene, capsys):
    words = [str(scene), f"--encoder={encoder}", "--chip_size=16"]
    asked = []
    with pytest.raises(KeyboardInterrupt):
        command.embed(
            ["xsmae embed", *words, f"--out={tmp_path}/out"],
            lambda: asked.append(1) or len(asked) > 5,
        )
    assert call(*words, f"--out={tmp_path}/out") == 0
    assert "resumes at row" in capsys.readouterr().out
    assert call(*words, f"--out={tmp_path}/whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_fails_the_scene_and_the_same_command_resumes(
    tmp_path, encoder, scene, monkeypatch, capsys
):
    words = [str(scene), f"--encoder={encoder}", "--chip_size=16"]
    assert call(*words, f"--out={tmp_path}/whole") == 0
    for attribute in ("add", "commit"):
        out = tmp_path / attribute

        def full(*args):
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr(strips.Strips, attribute, full)
            patch.setattr(Manifest, "fail", full)
            assert call(*words, f"--out={out}") == 3
        assert "No space left" in capsys.readouterr().out
        assert call(*words, f"--out={out}") == 0
        assert contents(out) == contents(tmp_path / "whole")


def test_a_bad_scene_is_named_and_the_others_are_embedded(
    tmp_path, encoder, scene, capsys
):
    truncated = make_scene(tmp_path / "truncated.tif", 200, 200)
    truncated.write_bytes(truncated.read_bytes()[:60_000])
    empty = write(
        tmp_path / "empty.tif", np.zeros((3, 40, 40), np.uint8), nodata=0,
        photometric="rgb",
    )  # fmt: skip
    small = make_scene(tmp_path / "small.tif", 12, 40)
    nowhere = make_scene(tmp_path / "nowhere.tif", 40, 40, crs=None)
    missing = tmp_path / "missing.tif"
    wrong = [truncated, empty, small, nowhere, missing]
    out = tmp_path / "out"
    words = [f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
    assert call(*wrong, scene, *words) == 3
    said = capsys.readouterr().out.splitlines()
    failed = [line for line in said if line.startswith("failed: ")]
    for line, path, word in zip(
        failed, wrong, ("truncated", "valid", "12 x 40", "gsd", "exist"), strict=True
    ):
        assert str(path) in line
        assert word in line
    assert said[-1] == "5 of 6 scenes failed"
    assert not list(out.glob(".*"))
    listed = json.loads((out / "manifest.json").read_text())
    assert listed["failed"].keys() == {path.stem for path in wrong}
    assert listed["scenes"].keys() == {"scene"}
    assert (
        call(scene, f"--encoder={encoder}", f"--out={tmp_path}/w", "--chip_size=16")
        == 0
    )
    assert (out / "scene.parquet").read_bytes() == (
        tmp_path / "w/scene.parquet"
    ).read_bytes()
    # Without a CRS there is no footprint, but there are vectors.
    assert call(nowhere, *words, "--gsd=10") == 0
    assert rows_of(out / "nowhere.parquet")[0]["geometry"] is None
    assert "nowhere" not in json.loads((out / "manifest.json").read_text())["failed"]


def test_damaged_files_are_written_again_and_those_of_others_stay(
    tmp_path, encoder, scene, capsys
):
    out = tmp_path / "out"
    words = [scene, f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
    assert call(*words) == 0
    before = contents(out)
    (out / "scene.parquet").write_bytes(b"x" + before["scene.parquet"][1:])
    assert call(*words) == 0
    assert contents(out) == before
    (out / "manifest.json").unlink()
    assert call(*words) == 0
    assert contents(out) == before
    capsys.readouterr()
    for change in ("--stride=8", "--dtype=int8", "--pooling=cls", "--min_valid=0.1"):
        assert call(*words, change) == 3
        assert "another" in capsys.readouterr().out
        assert (out / "scene.parquet").read_bytes() == before["scene.parquet"]
    (out / "manifest.json").write_text("{")
    assert call(*words) == 2
    assert "manifest.json" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "scene.parquet").write_text("a file of somebody")
    assert call(*words[:2], f"--out={other}", "--chip_size=16") == 3
    assert (other / "scene.parquet").read_text() == "a file of somebody"


def test_merged_shards_equal_one_run(tmp_path, encoder, capsys):
    scenes = [make_scene(tmp_path / f"s{i}.tif", 40 + i, 40) for i in range(5)]
    scenes.append(tmp_path / "missing.tif")
    shared = [*scenes, f"--encoder={encoder}", "--chip_size=16"]
    assert call(*shared, f"--out={tmp_path}/whole") == 3
    out = tmp_path / "parts"
    for i in range(3):
        assert call("--merge", f"--out={out}") == 2
        assert call(*shared, f"--out={out}", f"--shard={i}/3") == (3 if i == 2 else 0)
    listed = json.loads((out / "manifest-1-of-3.json").read_text())
    assert listed["scenes"].keys() == {"s1", "s4"}
    capsys.readouterr()
    assert call("--merge", f"--out={out}") == 3
    assert "missing" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    assert call("--merge", f"--out={out}") == 2  # there is nothing to merge


def test_a_shard_that_has_not_finished_is_not_merged(tmp_path, encoder, capsys):
    scenes = [make_scene(tmp_path / f"s{i}.tif", 40, 40) for i in range(2)]
    shared = [*scenes, f"--encoder={encoder}", "--chip_size=16", f"--out={tmp_path}/o"]
    for i in range(2):
        assert call(*shared, f"--shard={i}/2") == 0
    path = tmp_path / "o" / "manifest-0-of-2.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "scenes": {}}))
    assert call("--merge", f"--out={tmp_path}/o") == 2
    assert "s0" in capsys.readouterr().err


def test_commands_that_cannot_work_are_refused(tmp_path, encoder, scene, capsys):
    same = make_scene(tmp_path / scene.name, 40, 40)
    for words, match in (
        (["--gsd_csv=x"], "gsd_csv"),
        (["--chip_size=big"], "chip_size"),
        (["--chip_size=0"], "chip_size"),
        (["--stride=10km"], "stride"),
        (["--shard=4/4"], "shard"),
        (["--datetime=yesterday"], "datetime"),
        (["--datetime=2020-08-31/"], "2020-06-01/2020-08-31"),
        (["--datetime=../2020-08-31"], "2020-06-01/2020-08-31"),
        (["--datetime=2020-01-01/2020-02-01/2020-03-01"], "2020-06-01/2020-08-31"),
        (["--datetime=2020-08-31/2020-06-01"], "START/END"),
        (["--datetime=0001-01-01T00:00+10:00"], "datetime"),
        (["--batch_size=0"], "batch_size"),
        (["--min_valid=2"], "min_valid"),
        (["--dtype=float64"], "dtype"),
        ([str(same)], str(same)),
        (["--encoder=nowhere"], "nowhere"),
    ):
        first = [scene, f"--encoder={encoder}", f"--out={tmp_path}/out"]
        assert call(*first, *words) == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for words, match in (
        (["--chip_size=18"], "patch size 4"),
        (["--chip_size=300m", "--size=10"], "--size=10"),
        (["--chip_size=16", "--stride=17"], "17 x 17"),
    ):
        assert call(*first, *words) == 3
        assert match in capsys.readouterr().out


def test_panels_cover_the_grid(scene, tmp_path, monkeypatch):
    """Rows of chips of a file in strips, squares of one in tiles."""
    monkeypatch.setattr("xsmae.scenes.chips.PANEL", 48 * 48 * 3)
    tiled = make_scene(tmp_path / "a.tif", tiled=True, blockxsize=16, blockysize=16)
    for path, shape in ((scene, (1, 13)), (tiled, (4, 4))):
        with open_raster(path) as raster:
            grid = plan_grid(
                raster, chip_size=Length(CHIP, False), stride=Length(10, False),
                side=None, patch_size=4, image_size=32,
            )  # fmt: skip
            assert panel_shape(grid, raster, 3) == shape
        rows, columns = grid.shape
        for first in (0, shape[0]):
            todo = range(first, rows)
            found = [c for p in panels(grid, shape, todo) for c in p.chips]
            expected = [(r, c) for r in todo for c in range(columns)]
            assert sorted(found) == expected


def test_tiles_and_small_panels(tmp_path, encoder, scene, monkeypatch):
    monkeypatch.setattr("xsmae.scenes.chips.PANEL", 48 * 48 * 3)
    path = make_scene(tmp_path / "scene.tif", tiled=True, blockxsize=16, blockysize=16)
    words = [f"--encoder={encoder}", "--chip_size=16", "--stride=10"]
    for name, file in (("strips", scene), ("tiles", path)):
        assert call(file, *words, f"--out={tmp_path / name}") == 0
    rows = check_rows(tmp_path / "tiles" / "scene.parquet", path, encoder)
    others = rows_of(tmp_path / "strips" / "scene.parquet")
    assert [row["id"] for row in rows] == [row["id"] for row in others]


def test_memory_does_not_grow_with_the_height(tmp_path, encoder, monkeypatch):
    encoder = load_encoder(encoder)
    plan = Plan(chip_size=Length(64, False)).of(encoder)
    groups = Groups(encoder, pooling="mean", batch_size=8)
    zeros = np.zeros((8, groups.width), np.float32)
    monkeypatch.setattr(groups, "_send", lambda images, gsd, zeros=zeros: zeros)
    peaks = []
    for height in (512, 512, 4096):  # the first one imports
        path = make_scene(tmp_path / f"{height}_{len(peaks)}.tif", height, 256)
        with open_raster(path) as raster:
            tracemalloc.start()
            layout = Chips.of(encoder, raster, plan)
            for _ in encoded(layout, groups, rows=range(layout.reader.grid.shape[0])):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # Pixels alone would take 12 bytes each.
    assert peaks[2] - peaks[1] < (4096 - 512) * 256
