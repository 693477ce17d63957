"""Real rasters beside the repository: the table of 35, EuroSAT's bands, Chesapeake.

They skip where `../shared/data` is absent.
"""

import csv

import numpy as np
import pytest

from tests.support.raster_table import DIFFERENT, NAN, main, read_table
from tests.support.rasters import DATA, REASON, unpack
from xsmae.data.geotiff import WindowIndex
from xsmae.data.raster import open_raster
from xsmae.data.sensors import SENSORS
from xsmae.errors import UserError

pytest.importorskip("rasterio", reason=REASON)


def has(name):
    return pytest.mark.skipif(
        not (DATA / name).is_file(), reason=f"no real rasters: {DATA / name} is absent"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpack("geotiff_small.zip", tmp_path_factory.mktemp("geotiff"))


@has("geotiff_small.zip")
def test_the_table(folder, capsys):
    lines = read_table(folder)
    assert len(lines) == 35
    wrong = {line.file: line.outcome for line in lines if not line.passed}
    assert wrong == {}
    different = {line.file for line in lines if line.outcome != "as expected"}
    assert different == set(DIFFERENT)
    # The table says how many pixels are NaN, which GDAL's masks do not.
    with (folder / "GEOTIFF.csv").open(newline="") as file:
        masks = {row["file"]: row["mask"] for row in csv.DictReader(file)}
    for line in lines:
        if DIFFERENT.get(line.file) == NAN:
            share = float(masks[line.file].removeprefix("NaN pixels ").rstrip("%"))
            assert line.valid == pytest.approx(1 - share / 100, abs=1e-5)
    assert main([str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 37


@has("geotiff_small.zip")
def test_masks_of_one_scene(folder):
    """Five ways to say which pixels are valid, of one picture."""
    found = {}
    for way in ("plain", "alpha", "extmask", "mask", "nodata"):
        with open_raster(folder / "colorado_15cm" / f"hro_{way}.tif") as raster:
            assert raster.bands == ("red", "green", "blue")
            found[way] = raster.read((0, 0, *raster.shape))
    plain = found.pop("plain")[0]
    for values, valid in found.values():
        assert np.array_equal(values[valid], plain[valid])
        assert not values[~valid].any()
    assert np.array_equal(found["mask"][1], found["extmask"][1])


@has("eurosat_ms_270.zip")
def test_b8a_is_the_last_band_of_eurosat(tmp_path):
    unpack("eurosat_ms_270.zip", tmp_path)
    index = WindowIndex.build(tmp_path, sensor="eurosat_ms")
    assert len(index) == 270
    assert index.scenes[0].bands == SENSORS["eurosat_ms"].bands
    means = []
    for i in range(0, 270, 9):
        window = index[i]
        values, valid = index.raster(window.scene).read(window.box)
        assert valid.all()
        assert window.gsd == pytest.approx((10, 10), rel=0.01)
        means.append(values.mean(axis=(0, 1)))
    bands = dict(zip(index.scenes[0].bands, np.transpose(means), strict=True))
    near = {
        name: np.abs(bands[name] - bands["B08"]).mean() / bands["B08"].mean()
        for name in bands
        if name != "B08"
    }
    assert min(near, key=near.get) in ("B8A", "B07")
    assert near["B8A"] < 0.15 < near["B09"]
    assert bands["B10"].mean() < 0.01  # cirrus: next to nothing
    assert 0.02 < bands["B04"].mean() < 0.3  # a reflectance


@has("chesapeake.zip")
def test_chesapeake(tmp_path):
    unpack("chesapeake.zip", tmp_path)
    for part in ("naip_new", "naip_old"):
        root = tmp_path / "chesapeake" / part
        with pytest.raises(UserError, match="gsd="):  # they have no CRS
            WindowIndex.build(root, sensor="naip")
        index = WindowIndex.build(root, sensor="naip", gsd=1)
        assert len(index) == 16
        assert index.scenes[0].bands == ("red", "green", "blue", "nir")
        window = index[0]
        assert window.gsd == (1, 1)
        values, valid = index.raster(0).read(window.box, size=64)
        assert valid.all()
        assert 0 < values.mean() < 1
