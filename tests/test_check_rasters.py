"""`xsmae check-data` on rasters: the table of bands, warnings, kinds, the pictures."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.support.rasters import REASON, land, write
from xsmae.cli import check_data, pretrain
from xsmae.data.geotiff_kinds import kinds_of_rasters
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.sensors import SENSORS
from xsmae.data.survey import settings_of, survey

pytest.importorskip("rasterio", reason=REASON)

NAMES = ("red", "green", "nir")


@pytest.fixture
def scenes(tmp_path):
    """Two folders of four rasters of 16 bits with a scale; a tenth has no value."""
    root = tmp_path / "scenes"
    for folder in ("field", "roof"):
        (root / folder).mkdir(parents=True)
        for i in range(4):
            data = land(48, 40, dtype="uint16") * 10 + i
            data[:, :, :4] = 0
            write(
                root / folder / f"{i}.tif", data, descriptions=NAMES, nodata=0,
                scales=(1e-4,) * 3,
            )  # fmt: skip
    return root


def run(root, tmp_path, *flags, config="geotiff"):
    data = [f"--data={config}", f"--data.root={root}", f"--out={tmp_path / 'out'}"]
    return check_data.main(["check-data", *data, "--samples=4", *flags])


def report_of(tmp_path):
    return json.loads((tmp_path / "out/report.json").read_text())


def test_the_table_is_of_valid_training_pixels(scenes, tmp_path, capsys):
    write(
        scenes / "field/9.tif", land(48, 40) * 0 + np.uint16(60000),
        descriptions=NAMES, scales=(1e-4,) * 3,
    )  # fmt: skip
    (tmp_path / "test.txt").write_text("field/9.tif\n")
    flags = ["--data.labels=folder", f"--test.split={tmp_path / 'test.txt'}"]
    assert run(scenes, tmp_path, *flags) == 0
    report = report_of(tmp_path)
    source = GeotiffSource(scenes)
    ids = [source.id(i) for i in range(len(source))]
    pixels = np.stack([
        source[i].image[source[i].valid] for i in range(9) if ids[i] != "field/9.tif"
    ]).reshape(-1, 3)  # fmt: skip
    for place, band in enumerate(NAMES):
        row, values = report["bands"][band], pixels[:, place].astype(np.float64)
        assert row["min"] == values.min() > 0
        assert row["max"] == values.max() < 1
        assert row["mean"] == pytest.approx(values.mean())
        assert row["std"] == pytest.approx(values.std())
        assert row["valid"] == pytest.approx(0.9)
        for percent in (2, 50, 98):
            expected = np.percentile(values, percent)
            assert row[f"p{percent}"] == pytest.approx(expected, abs=2e-3)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.strip().startswith("nir"))
    assert len(line.split()) == 9
    assert line.endswith(" 90.0%")
    assert "valid pixels of 8 images outside the test part" in printed


def test_pictures(scenes, tmp_path):
    write(scenes / "field/none.tif", land(48, 40, dtype="uint16"), descriptions=NAMES,
          scales=(1e-4,) * 3, crs=None)  # fmt: skip
    flags = ["--data.gsd=10", "--colours=nir,red,green"]
    assert run(scenes, tmp_path, *flags) == 0
    report = report_of(tmp_path)
    west, south, east, north = report["footprints"]["field/0.tif"]
    assert 14.99 < west < east < 15.02
    assert 45 < south < north < 45.2
    assert report["without_place"] == {"field/none.tif": "no CRS"}
    for name in ("contact_sheet", "histograms", "footprints"):
        with Image.open(tmp_path / f"out/{name}.png") as picture:
            assert picture.width > 600


def test_the_command_runs_as_printed(scenes, tmp_path, capsys):
    """A folder with a space, a band of one value, labels and a split."""
    root = scenes.rename(tmp_path / "my scenes")
    for path in root.rglob("*.tif"):
        data = land(48, 40, dtype="uint16") * 10
        data[2] = 500
        write(path, data, descriptions=NAMES, scales=(1e-4,) * 3)
    flags = ["--data.labels=folder", "--data.test_fraction=0.25"]
    flags += ["--test.split=test", "--test.min_valid=0.4"]
    assert run(root, tmp_path, *flags, config="geotiff:size=tiny") == 0
    printed = capsys.readouterr().out
    command = printed[printed.index("xsmae pretrain") :].partition("\n\n")[0]
    # As a shell reads it, with its quotes and continued lines.
    told = command.replace("xsmae pretrain", r"printf '%s\n'", 1)
    done = subprocess.run(["sh", "-c", told], capture_output=True, text=True)
    arguments = done.stdout.splitlines()
    assert f"--config.data.root={root}" in arguments
    assert "--config.knn.test.split=test" in arguments
    report = report_of(tmp_path)
    (warning,) = report["warnings"]
    assert warning.startswith("--test.min_valid is left out")
    assert report["command"][0].endswith("--config=geotiff:size=tiny")
    assert report["std"][2] < 1e-8
    assert pretrain.main(["xsmae pretrain", *arguments, "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert "mean=" not in shown.err  # given, so not measured


def test_settings_keep_small_numbers():
    found = settings_of((1.23456789e-3, 300.0), (4.4e-4, 0.0), "float32")
    assert found == {"mean": (0.00123457, 300.0), "std": (0.00044, 0.03)}
    found = settings_of((0.123456, 1.0), (0.0, 0.2), "uint8")
    assert found == {"mean": (0.1235, 1.0), "std": (0.0039, 0.2)}


def test_a_window_without_valid_pixels_does_not_count(tmp_path):
    data = land(32, 64)
    data[:, :, 32:] = 0
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    write(tmp_path / "a.tif", data, nodata=0, **tiles)
    found = survey(GeotiffSource(tmp_path, window=32, min_valid=0), pixels=100)
    assert [image.valid for image in found.images] == [1, 0]
    mean, _ = found.statistics()
    expected = data[:, :, :32].mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert found.pixels().shape == (50, 3)
    assert found.pixels().min() > 0


@pytest.mark.parametrize(
    ("mean", "std", "wrong"),
    [
        ("(0.1255,0.1255,0.1255)", "(0.0722,0.0722,0.0722)", ()),
        ("(0.1255,0.1255,0.9)", "(0.0722,0.0722,0.0722)", ("nir",)),
        ("(0.1255,0.1255,0.1255)", "(0.0722,0.2,0.01)", ("green", "nir")),
    ],
)
def test_statistics_that_do_not_fit_are_a_warning(
    mean, std, wrong, scenes, tmp_path, capsys
):
    assert run(scenes, tmp_path, f"--mean={mean}", f"--std={std}") == 0
    warnings = report_of(tmp_path)["warnings"]
    assert len(warnings) == bool(wrong)
    named = {name for name in NAMES if warnings and f"{name} mean" in warnings[0]}
    assert named == set(wrong)
    printed = capsys.readouterr().out
    assert ("warning: " in printed) == bool(wrong)


def test_values_far_from_what_is_published_are_a_warning(tmp_path, capsys):
    """The offset of baseline 04.00 that nobody removed: every mean is 0.1 too high."""
    sensor, chosen = SENSORS["sentinel2_l1c"], ("B08", "B02")
    flags = ["--data.sensor=sentinel2_l1c", f"--data.bands={chosen}"]
    rng, shape = np.random.default_rng(0), (48, 40)
    for name, shift in (("right", 0), ("offset", 1000)):
        (tmp_path / name).mkdir()
        planes = [
            rng.normal(1e4 * mean, 1e4 * std, shape).clip(1, 2e4) + shift
            for mean, std in zip(sensor.mean, sensor.std, strict=True)
        ]
        data = np.array(planes, np.uint16)
        write(tmp_path / name / "a.tif", data, descriptions=sensor.bands)
        assert run(tmp_path / name, tmp_path, *flags) == 0
        warnings = report_of(tmp_path)["warnings"]
        assert len(warnings) == (shift > 0)
    assert "published for sentinel2_l1c" in warnings[0]
    assert "B02 mean 1." in warnings[0]
    assert "sensor, scale and offset" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mean=(0.1,0.1,0.1)"], "expected --mean and --std"),
        (["--mean=(0.1,)", "--std=(0.1,)"], "mean has 1 values, expected 3"),
        (["--mean=(0.1,)*3", "--std=x"], "mean"),
        (["--mean=(0,0,0)", "--std=(1,1,0)"], "std=(1, 1, 0), expected"),
        (["--colours=nir,red"], "three of red,green,nir"),
        (["--colours=nir,red,blue"], "three of red,green,nir"),
    ],
)
def test_wrong_flags(flags, expected, scenes, tmp_path, capsys):
    assert run(scenes, tmp_path, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error
    assert "config." not in error
    assert not (tmp_path / "out").exists()


def test_rasters_without_any_value_are_refused(tmp_path, capsys):
    root = tmp_path / "scenes"
    root.mkdir()
    write(root / "a.tif", land(32, 32) * 0, nodata=0)
    assert run(root, tmp_path, "--data.min_valid=0") == 2
    assert "a.tif: no pixel has a value" in capsys.readouterr().err


def test_kinds_of_rasters_that_do_not_fit(scenes, tmp_path, capsys):
    write(scenes / "other.tif", land(48, 40))
    write(scenes / "deep.tif", land(48, 40, dtype="uint16"))
    (scenes / "broken.tif").write_bytes(b"II*\x00")
    kinds = kinds_of_rasters(scenes)
    assert [(k.bands, len(k.names)) for k in kinds[:2]] == [
        (NAMES, 8), (("band_1", "band_2", "band_3"), 1),
    ]  # fmt: skip
    problems = {k.names: k.problem for k in kinds[2:]}
    assert set(problems) == {("broken.tif",), ("deep.tif",)}
    assert "uint16 without a scale" in problems["deep.tif",]
    assert run(scenes, tmp_path) == 2
    printed = capsys.readouterr()
    assert "11 rasters of 4 kinds" in printed.out
    assert "8: usable, bands red,green,nir (field/0.tif, " in printed.out
    assert printed.err.splitlines()[-1].startswith("xsmae: ")


def test_damaged_rasters_are_named(scenes, tmp_path, capsys):
    (scenes / "field/broken.tif").write_bytes(b"II*\x00")
    assert run(scenes, tmp_path) == 0
    assert set(report_of(tmp_path)["rejected_rasters"]) == {"field/broken.tif"}
    assert "1 rasters cannot be used\n  field/broken.tif: " in capsys.readouterr().out
