"""Rasters that the tests write: bands, GSD, validity, values, windows, processes."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.support.rasters import REASON, UTM, land, north_up, write
from xsmae.data import gdal
from xsmae.data.raster import open_raster
from xsmae.data.raster_resample import Resampled, weights
from xsmae.data.sensors import SENSORS
from xsmae.errors import BadImageError, UserError

rasterio = pytest.importorskip("rasterio", reason=REASON)
from rasterio.enums import ColorInterp  # noqa: E402

RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "raster.tif"


def whole(raster, **options):
    return raster.read((0, 0, *raster.shape), **options)


# What is found in the header.


def test_facts(path):
    write(path, land(50, 60), tiled=True, blockxsize=16, blockysize=32, nodata=0)
    with open_raster(path) as raster:
        assert raster.shape == (50, 60)
        assert raster.bands == ("band_1", "band_2", "band_3")
        assert raster.dtype == "uint8"
        assert raster.crs == "EPSG:32633"
        assert raster.transform[:6] == UTM
        assert raster.block_shape == (32, 16)
        assert raster.nodata == (0, 0, 0)
        assert raster.scale == (1 / 255,) * 3
        assert raster.offset == (0, 0, 0)
        assert raster.notes() == []


def test_names(path):
    write(path, land(8, 8), descriptions=("B4", "", "B2"))
    assert open_raster(path).bands == ("B4", "band_2", "B2")
    write(path, land(8, 8), descriptions=("B4", "B04", "B2"))
    assert open_raster(path).bands == ("band_1", "band_2", "B2")
    write(path, land(8, 8), photometric="rgb")
    assert open_raster(path).bands == ("red", "green", "blue")


def test_bands_without_names_are_chosen_by_the_order_of_the_sensor(path):
    data = land(8, 8, bands=13, dtype="uint16")
    write(path, data)
    order = SENSORS["eurosat_ms"].bands  # B8A is the last one
    for chosen in (("B8A", "B02"), tuple(sorted(order)), SENSORS["hls_s30"].bands):
        raster = open_raster(path, chosen, sensor="eurosat_ms")
        assert raster.bands == chosen
        assert raster.indexes == tuple(1 + order.index(band) for band in chosen)
        assert any("in the order of eurosat_ms" in note for note in raster.notes())


def test_given_names_choose_or_name(path):
    data = land(8, 8, bands=3)
    write(path, data, descriptions=("B4", "B3", "B2"))
    with open_raster(path, bands=("B02", "B04")) as raster:
        assert raster.bands == ("B02", "B04")
        assert np.array_equal(whole(raster)[0][..., 0], data[2] / np.float32(255))
    assert open_raster(path, bands=("x", "y", "z")).bands == ("x", "y", "z")
    for bands in (("B4", "x"), (), "B4", ("B4", "b04"), ("a", "b", "c", "d")):
        with pytest.raises(UserError, match="bands="):
            open_raster(path, bands=bands)
    with open_raster(path) as raster:
        assert np.array_equal(
            whole(raster, bands=["B2"])[0][..., 0], data[2] / np.float32(255)
        )
        with pytest.raises(UserError, match=r"B9.*B4, B3, B2"):
            whole(raster, bands=["B9"])


def test_200_bands(path):
    data = land(20, 30, bands=200)
    write(path, data)
    with open_raster(path) as raster:
        values, valid = whole(raster, bands=["band_200", "band_7"])
    assert valid.all()
    assert np.array_equal(values[..., 0], data[199] / np.float32(255))
    assert np.array_equal(values[..., 1], data[6] / np.float32(255))


# GSD.


def meridian_arc(latitude):
    """Metres per degree along the meridian and the parallel, the series of NOAA."""
    phi = np.radians(latitude)
    y = 111132.954 - 559.822 * np.cos(2 * phi) + 1.175 * np.cos(4 * phi)
    x = 111412.84 * np.cos(phi) - 93.5 * np.cos(3 * phi) + 0.118 * np.cos(5 * phi)
    return y, x


FOOT, SURVEY_FOOT = 0.3048, 1200 / 3937
ROTATED = (10 * np.cos(0.5), -20 * np.sin(0.5), 10 * np.sin(0.5), 20 * np.cos(0.5))


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        # The scale on the central meridian is 0.9996: 10 m of the map are more.
        ("EPSG:32633", UTM, (10 / 0.9996,) * 2),
        ("EPSG:4326", north_up(10, 60, 1e-4), np.multiply(1e-4, meridian_arc(60))),
        # On a sphere, the ground is smaller than the map by the cosine.
        ("EPSG:3857", north_up(0, 8399737.89, 10), (5.0, 5.0)),
        # State planes of Texas, in US survey feet and in feet of the metre.
        ("EPSG:2276", north_up(2_490_000, 7_000_000, 2), (2 * SURVEY_FOOT,) * 2),
        ("EPSG:2222", north_up(700_000, 1_000_000, 2), (2 * FOOT,) * 2),
        ("EPSG:3413", north_up(-50, 50, 100), (100 * 1.0309,) * 2),  # the pole itself
        ("EPSG:4326", north_up(179.999, 0.001, 1e-4), (11.0574, 11.1320)),
    ],
    ids=[
        "metres", "degrees at 60 N", "Mercator at 60 N", "survey feet",
        "feet", "pole", "antimeridian",
    ],
)  # fmt: skip
def test_gsd(path, crs, transform, expected):
    write(path, land(20, 20, bands=1), crs=crs, transform=transform)
    found = open_raster(path).gsd
    tolerance = 0.004 if crs == "EPSG:3857" else 0.0005
    assert found == pytest.approx(tuple(expected), rel=tolerance)


def test_gsd_of_a_rotated_grid(path):
    a, b, d, e = ROTATED  # 10 m along a row, 20 m from row to row
    turned = (a, b, 500_000, d, e, 5_000_000)
    write(path, land(20, 20, bands=1), transform=turned)
    raster = open_raster(path)
    assert raster.gsd == pytest.approx((20 / 0.9996, 10 / 0.9996), rel=1e-4)
    assert any("2.00 times" in note for note in raster.notes())


def test_a_gsd_that_varies_is_told(path):
    world = north_up(-10, 60, 1.0)
    write(path, land(60, 20, bands=1), crs="EPSG:4326", transform=world)
    raster = open_raster(path)
    assert raster.gsd == pytest.approx(meridian_arc(30), rel=1e-3)
    assert any("within the raster" in note for note in raster.notes())


@pytest.mark.parametrize("missing", ["crs", "transform"])
def test_gsd_that_is_not_known(path, missing):
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning)
        if (missing == "transform")
        else _nothing()
    ):
        write(path, land(8, 8), **{missing: None})
    raster = open_raster(path)
    assert raster.gsd is None
    with pytest.raises(UserError, match=r"raster\.tif.*gsd="):
        raster.known_gsd()
    assert any("GSD is not known" in note for note in raster.notes())
    assert open_raster(path, gsd=0.5).known_gsd() == (0.5, 0.5)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_a_given_gsd_counts(path):
    write(path, land(8, 8))
    raster = open_raster(path, gsd=(3, 2))
    assert raster.gsd == (3, 2)
    assert any("3 x 2" in note and "10" in note for note in raster.notes())
    for bad in (0, -1, float("nan"), "ten", (1, 2, 3)):
        with pytest.raises(UserError):
            open_raster(path, gsd=bad)


# Validity.


def test_nodata_in_all_or_in_any_band(path):
    data = land(8, 8)
    data[:, 0] = 0
    data[1, 1] = 0
    write(path, data, nodata=0)
    expected = np.ones((8, 8), bool)
    expected[0] = False
    with open_raster(path) as raster:
        values, valid = whole(raster)
        assert np.array_equal(valid, expected)
        assert raster.valid_fraction() == 7 / 8
        assert not values[0].any()
        # Of the bands that are read.
        assert whole(raster, bands=["band_2"])[1].sum() == 6 * 8
    expected[1] = False
    with open_raster(path, nodata_rule="any") as raster:
        assert np.array_equal(whole(raster)[1], expected)
        assert raster.valid_fraction() == 6 / 8
    with pytest.raises(UserError, match=r"most.*all, any"):
        open_raster(path, nodata_rule="most")


def test_nodata_that_cannot_occur(path):
    write(path, land(8, 8, dtype="uint16"), nodata=None)
    with rasterio.open(path, "r+") as raster:
        raster.nodata = 0.5
    raster = open_raster(path, scale=1)
    assert raster.nodata == (None,) * 3
    assert any("0.5 cannot occur in uint16" in note for note in raster.notes())
    assert raster.valid_fraction() == 1


@pytest.mark.parametrize("internal", [True, False])
def test_masks_within_and_beside_the_file(path, internal):
    mask = np.ones((40, 40), bool)
    mask[:10] = False
    write(path, land(40, 40), mask=mask, internal=internal)
    assert (path.parent / "raster.tif.msk").exists() is not internal
    with open_raster(path) as raster:
        assert np.array_equal(whole(raster)[1], mask)
        assert raster.valid_fraction() == 0.75
        assert any("by a mask" in note for note in raster.notes())


def test_a_mask_and_nodata_both_count(path):
    data, mask = land(40, 40), np.ones((40, 40), bool)
    data[:, :4], mask[-6:] = 0, False
    write(path, data, mask=mask, nodata=0)
    with open_raster(path) as raster:
        assert raster.valid_fraction() == 30 / 40


def test_alpha_is_a_mask(path):
    data = land(40, 40, bands=4)
    data[3] = 255
    data[3, :10] = 0
    data[3, 10] = np.linspace(0, 255, 40)  # a soft edge
    write(path, data, photometric="rgb", alpha="yes")
    with open_raster(path) as raster:
        assert raster.bands == ("red", "green", "blue")
        valid = whole(raster)[1]
        assert not valid[:10].any()
        assert valid[11:].all()
        assert valid[10].sum() == 20
        assert any("is alpha" in note for note in raster.notes())


def test_near_infrared_that_gdal_calls_alpha_is_data(path):
    data = land(40, 40, bands=4)
    data[3, :5] = 0  # deep water
    write(path, data, photometric=None)
    with rasterio.open(path) as raster:
        assert raster.colorinterp == RGBA
    with open_raster(path) as raster:
        assert raster.bands == ("red", "green", "blue", "band_4")
        values, valid = whole(raster)
        assert valid.all()
        assert np.array_equal(values[..., 3], data[3] / np.float32(255))
        # GDAL would weigh the colours by near infrared.
        small, _ = whole(raster, size=20)
        means = data.reshape(4, 20, 2, 20, 2).mean(axis=(2, 4)) / 255
        assert small == pytest.approx(np.moveaxis(means, 0, -1), abs=1e-6)
        assert any("called alpha" in note for note in raster.notes())
    assert open_raster(path, sensor="naip").bands == SENSORS["naip"].bands
    raster = open_raster(path, bands=("r", "g", "b", "n"))
    assert any("data: n" in note for note in raster.notes())
    # A constant fourth band is alpha, unless the user names it.
    data[3] = 255
    write(path, data, photometric=None)
    assert len(open_raster(path).bands) == 3
    assert open_raster(path, bands=("r", "g", "b", "n")).bands[3] == "n"


@pytest.mark.parametrize("nodata", [None, -9999.0, float("nan")])
def test_what_is_not_finite_is_not_valid(path, nodata):
    data = land(8, 8, dtype="float32")
    data[1, 0, :3] = np.nan, np.inf, -np.inf
    data[:, 2] = -9999
    write(path, data, nodata=nodata)
    with open_raster(path) as raster:
        values, valid = whole(raster)
        assert not valid[0, :3].any()
        assert valid[2].all() == (nodata != -9999)
        assert np.isfinite(values).all()
        assert raster.valid_fraction() == valid.mean()


# Values.


def test_8_bits_and_floats(path):
    data = land(8, 8)
    write(path, data)
    values, _ = whole(open_raster(path))
    assert values.dtype == np.float32
    assert np.array_equal(values, np.moveaxis(data, 0, -1) / np.float32(255))
    for dtype in ("float32", "float64"):
        write(path, data.astype(dtype) * 1.5)
        values, _ = whole(open_raster(path))
        assert values.dtype == np.float32
        assert np.array_equal(values, np.moveaxis(data, 0, -1) * np.float32(1.5))
    write(path, np.full((1, 4, 4), 1e300))
    assert not whole(open_raster(path))[1].any()  # beyond float32


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "uint32", "int8"])
def test_integers_need_a_scale(path, dtype):
    data = (land(8, 8) // 4).astype(dtype)
    write(path, data)
    with pytest.raises(UserError, match=f"{dtype}.*scale="):
        open_raster(path)
    values, _ = whole(open_raster(path, scale=0.5, offset=(0, 1, 2)))
    expected = np.moveaxis(data, 0, -1) * 0.5 + [0, 1, 2]
    assert np.array_equal(values, expected.astype(np.float32))
    write(path, data, scales=(0.1,) * 3, offsets=(-1.0,) * 3)
    raster = open_raster(path)
    assert raster.scale == (0.1,) * 3
    assert raster.offset == (-1,) * 3
    assert any("the file: 0.1 and -1" in note for note in raster.notes())
    expected = np.moveaxis(data, 0, -1) * 0.1 - 1
    assert whole(raster)[0] == pytest.approx(expected, abs=1e-5)


def test_32_bits_keep_their_digits(path):
    write(path, np.full((1, 4, 4), 2**24 + 1, "int32"))
    values, _ = whole(open_raster(path, scale=1, offset=-(2**24)))
    assert (values == 1).all()


def test_fewer_bits(path):
    write(path, np.full((1, 8, 8), 4095, "uint16"), nbits=12)
    raster = open_raster(path)
    assert (whole(raster)[0] == 1).all()
    assert any("NBITS=12" in note for note in raster.notes())
    write(path, np.full((1, 8, 8), 15, "uint8"), nbits=4)
    assert (whole(open_raster(path))[0] == 1).all()


def test_what_is_refused(path):
    write(path, np.ones((1, 8, 8), "complex64"))
    with pytest.raises(UserError, match="complex64"):
        open_raster(path, scale=1)
    write(path, np.ones((1, 8, 8), "uint8"), photometric=None)
    with rasterio.open(path, "r+") as raster:
        raster.write_colormap(1, {1: (255, 0, 0, 255)})
    with pytest.raises(UserError, match="colour table"):
        open_raster(path)
    write(path, land(8, 8))
    for bad in ({"offset": 1}, {"scale": 0}, {"scale": (1, 2)}, {"scale": "x"}):
        with pytest.raises(UserError, match=next(iter(bad))):
            open_raster(path, **bad)


def test_presets(path):
    write(path, np.full((12, 8, 8), 3000, "uint16"))
    raster = open_raster(path, sensor="sentinel2_l2a_since_0400")
    assert raster.bands == SENSORS["sentinel2_l2a"].bands
    assert whole(raster)[0] == pytest.approx(np.full((8, 8, 12), 0.2))
    assert raster.nodata == (0,) * 12
    raster = open_raster(path, sensor="sentinel2_l2a")
    assert whole(raster)[0] == pytest.approx(np.full((8, 8, 12), 0.3))
    with pytest.raises(UserError, match="sentinel2_l1c"):  # which has 13 bands
        open_raster(path, sensor="sentinel2_l1c")
    with pytest.raises(UserError, match=r"sentinel3.*naip"):
        open_raster(path, sensor="sentinel3")
    # USGS's own example: 18,639 is 0.313.
    write(path, np.full((2, 8, 8), 18639, "uint16"), descriptions=("SR_B4", "B03"))
    raster = open_raster(path, sensor="landsat_c2_l2")
    assert raster.bands == ("SR_B4", "SR_B3")
    assert whole(raster)[0] == pytest.approx(np.full((8, 8, 2), 0.3126), abs=1e-4)
    write(path, land(8, 8), descriptions=("B2", "B3", "B4"))
    with pytest.raises(UserError, match=r"uint8.*int16"):
        open_raster(path, sensor="hls_s30")


def test_a_preset_and_the_file_must_agree(path):
    data = land(8, 8, dtype="int16")
    names = {"descriptions": ("B02", "B10", "B11")}
    write(path, data, **names, scales=(1e-4, 0.01, 0.01), offsets=(0.0,) * 3)
    raster = open_raster(path, sensor="hls_l30")
    assert raster.scale == (1e-4, 0.01, 0.01)
    write(path, data, **names, scales=(1e-3, 0.01, 0.01), offsets=(0.0,) * 3)
    with pytest.raises(UserError, match=r"0\.001.*0\.0001"):
        open_raster(path, sensor="hls_l30")
    assert open_raster(path, sensor="hls_l30", scale=2).scale == (2,) * 3
    write(path, data.astype("float32"), **names)
    raster = open_raster(path, sensor="hls_l30")
    assert raster.scale == (1,) * 3
    assert any("as they are" in note for note in raster.notes())


@pytest.mark.parametrize("sensor", SENSORS.values(), ids=SENSORS)
def test_the_presets_are_whole(sensor):
    count = len(sensor.bands)
    for field in ("wavelengths", "scale", "offset"):
        assert len(getattr(sensor, field)) == count
    for statistic in (sensor.mean, sensor.std):
        assert statistic is None or (len(statistic) == count and min(statistic) > 0)
    assert len({*sensor.bands}) == count


# Windows and sizes.


def test_windows(path):
    data = land(50, 60)
    write(path, data, tiled=True, blockxsize=16, blockysize=16)
    pixels = np.moveaxis(data, 0, -1) / np.float32(255)
    with open_raster(path) as raster:
        values, valid = raster.read((7, 9, 20, 30))
        assert np.array_equal(values, pixels[7:27, 9:39])
        assert valid.all()
        values, valid = raster.read((-5, 50, 20, 20))  # over two edges
        assert np.array_equal(values[5:, :10], pixels[:15, 50:])
        assert valid[5:, :10].all()
        assert valid.sum() == 15 * 10
        assert not values[~valid].any()
        for window in ((50, 0, 1, 1), (0, 0, 0, 5), (0, -9, 5, 9), (np.nan, 0, 1, 1)):
            with pytest.raises(UserError, match=r"50 x 60"):
                raster.read(window)
        with pytest.raises(UserError, match="whole pixels"):
            raster.read((0.5, 0, 4, 4))
        for size in (0, (4, 0), (1, 2, 3)):
            with pytest.raises(UserError, match="size="):
                raster.read((0, 0, 4, 4), size=size)


def test_smaller_sizes_are_averages_of_what_is_valid(path):
    data = land(64, 64)
    data[:, :20, :21] = 0
    write(path, data, nodata=0)
    with open_raster(path) as raster:
        values, valid = whole(raster, size=(16, 8))
    good = (data != 0).any(axis=0).reshape(16, 4, 8, 8)
    assert np.array_equal(valid, good.mean(axis=(1, 3)) >= 0.5)
    sums = data.reshape(3, 16, 4, 8, 8).sum(axis=(2, 4)) / 255
    means = np.moveaxis(sums / np.maximum(good.sum(axis=(1, 3)), 1), 0, -1)
    assert values[valid] == pytest.approx(means[valid], rel=1e-5)
    assert not values[~valid].any()


def test_fractions_of_pixels_and_larger_sizes(path):
    ramp = np.tile(np.arange(40, dtype="float32"), (40, 1))[None]
    write(path, ramp)
    with open_raster(path) as raster:
        values, _ = raster.read((0.25, 10.5, 20, 15), size=(8, 6))
        halves = np.repeat(ramp[0, 0], 2)[21:51]
        averages = halves.reshape(6, 5).mean(axis=1)
        assert values[..., 0] == pytest.approx(np.tile(averages, (8, 1)), abs=1e-4)
        values, valid = raster.read((4, 4, 8, 8), size=32)
        middles = np.clip(4 + 0.25 * (np.arange(32) + 0.5) - 0.5, 4, 11)
        assert values[..., 0] == pytest.approx(np.tile(middles, (32, 1)), abs=1e-4)
        assert valid.all()


def test_a_checkerboard_becomes_grey(path):
    board = (np.indices((128, 128)).sum(axis=0) % 2 * 200).astype("uint8")[None]
    write(path, board)
    values, _ = whole(open_raster(path), size=16)
    assert values == pytest.approx(np.full((16, 16, 1), 100 / 255), abs=1e-6)


def test_pieces_add_up(monkeypatch, path):
    data = land(100, 40)
    data[:, 30:50, :30] = 0
    write(path, data, nodata=0, tiled=True, blockxsize=16, blockysize=16)
    with open_raster(path) as raster:
        expected = raster.read((3, 2, 90, 37), size=(13, 7))
        fraction = raster.valid_fraction()
        monkeypatch.setattr("xsmae.data.raster_pixels.PIECE", 16 * 37 * 3)
        found = raster.read((3, 2, 90, 37), size=(13, 7))
        assert raster.valid_fraction() == fraction == 1 - 20 * 30 / 4000
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert np.array_equal(found[1], expected[1])


def test_weights_are_of_areas():
    found, first = weights(2.5, 8.5, 2)
    assert first == 2
    third = 1 / 3
    assert found == pytest.approx(
        np.array([[third / 2, third, third, third / 2, 0, 0, 0],
                  [0, 0, 0, third / 2, third, third, third / 2]])
    )  # fmt: skip
    result = Resampled(*(weights(0, 4, 2)[0] for _ in range(2)), bands=1)
    result.add(0, np.ones((4, 4, 1), np.float32), np.eye(4, dtype=bool)[::-1])
    assert result.result()[1].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1)])
def test_strips(path, shape):
    write(path, land(*shape))
    with open_raster(path) as raster:
        assert raster.shape == shape
        assert raster.gsd == pytest.approx((10.004, 10.004), abs=1e-3)
        assert whole(raster)[0].shape == (*shape, 3)
        assert whole(raster, size=4)[0].shape == (4, 4, 3)


def test_overviews_are_used_and_right(path):
    data = land(256, 256)
    mask = np.ones((256, 256), bool)
    mask[:64] = False
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    write(path, data, mask=mask, overviews=(2, 4, 8), **options)
    with open_raster(path) as raster:
        assert raster.overviews.factors == (2, 4, 8)
        values, valid = whole(raster, size=32)  # 8 times: from the overview of 4
        assert [name.level for name in gdal.idle() if name.path == str(path)] == [
            None,
            1,
        ]
        assert np.array_equal(valid, mask[4::8, 4::8])
    means = data.reshape(3, 32, 8, 32, 8).mean(axis=(2, 4)) / 255
    # Overviews of 8 bits are rounded.
    assert values[valid] == pytest.approx(np.moveaxis(means, 0, -1)[valid], abs=0.006)


def test_overviews_without_averages_or_masks(path):
    data = land(256, 256)
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    write(path, data, overviews=(2, 4), **options)
    with rasterio.open(path, "r+") as raster:
        raster.update_tags(OVR_RESAMPLING_ALG="NEAREST")
    raster = open_raster(path)
    assert any("NEAREST" in note for note in raster.notes())
    whole(raster, size=16)
    assert {name.level for name in gdal.idle() if name.path == str(path)} == {None}
    raster.close()
    # A mask that was made after the overviews.
    mask = np.ones((256, 256), bool)
    mask[:128] = False
    write(path, data, overviews=(2, 4), **options)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False),
        rasterio.open(path, "r+") as raster,
    ):
        raster.write_mask(mask)
    with open_raster(path) as raster:
        assert np.array_equal(whole(raster, size=16)[1], mask[::16, ::16])
        assert {n.level for n in gdal.idle() if n.path == str(path)} == {None, 1}
        assert raster.valid_cells([0, 128, 256], [0, 256]).tolist() == [[0], [1]]


def test_the_valid_part_of_large_rasters(path, monkeypatch):
    data = land(512, 512, bands=1)
    data[:, :, :128] = 0
    options = {"nodata": 0, "tiled": True, "blockxsize": 64, "blockysize": 64}
    write(path, data, **options)
    monkeypatch.setattr("xsmae.data.raster.EXACT", 128 * 128)
    monkeypatch.setattr("xsmae.data.raster_pixels.EXACT", 128 * 128)
    with open_raster(path) as raster:
        sampled = raster.valid_fraction()  # of 4 blocks, each wholly one or the other
        assert sampled in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert raster.valid_fraction() == sampled
    write(path, data, overviews=(2, 4, 8), **options)
    with open_raster(path) as raster:
        assert raster.valid_fraction() == 0.75


# Processes, threads, settings.


def test_pickled_forked_and_threaded(path):
    data = land(64, 64)
    write(path, data, tiled=True, blockxsize=16, blockysize=16)
    expected = np.moveaxis(data, 0, -1) / np.float32(255)
    with open_raster(path) as raster:
        whole(raster)  # a dataset is idle here
        again = pickle.loads(pickle.dumps(raster))
        assert np.array_equal(whole(again)[0], expected)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(whole(raster)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert all(np.array_equal(result, expected) for result in results)
    assert str(path) not in {name.path for name in gdal.idle()}


FORK = """
import multiprocessing, sys
import numpy as np
from xsmae.data import gdal
from xsmae.data.raster import open_raster

def child(raster, before, queue):
    alone = gdal.idle()
    values, _ = raster.read((0, 0, *raster.shape))
    queue.put((alone, len(gdal.idle()), float(np.abs(values - before).max())))

raster = open_raster(sys.argv[1])
before, _ = raster.read((0, 0, *raster.shape))
assert len(gdal.idle()) == 1
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(raster, before, queue))
process.start()
print(queue.get(timeout=60))
process.join(60)
assert process.exitcode == 0
assert np.array_equal(raster.read((0, 0, *raster.shape))[0], before)
"""


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork here"
)
def test_a_fork_opens_its_own(path):
    write(path, land(64, 64))
    done = subprocess.run(
        [sys.executable, "-c", FORK, path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "([], 1, 0.0)"


def test_few_datasets_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(gdal, "MAX_IDLE", 3)
    paths = [write(tmp_path / f"{i}.tif", land(8, 8)) for i in range(6)]
    rasters = [open_raster(path) for path in paths]
    assert [name.path for name in gdal.idle()] == [str(p) for p in paths[3:]]
    assert whole(rasters[0])[1].all()  # opened again
    for raster in rasters:
        raster.close()
    assert gdal.idle() == []


def test_settings_are_ours_unless_the_user_sets_them(path, monkeypatch, caplog):
    write(path, land(8, 8))
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    found = gdal.settings(str(path))
    assert found["GDAL_CACHEMAX"] == 32 * 2**20
    assert found["GDAL_NUM_THREADS"] == 1
    assert "GDAL_DISABLE_READDIR_ON_OPEN" not in found  # sidecars are found
    with caplog.at_level("DEBUG", logger="xsmae"):
        open_raster(path).close()
    assert any("GDAL_CACHEMAX" in record.message for record in caplog.records)
    monkeypatch.setenv("GDAL_CACHEMAX", "64")
    with rasterio.Env(GDAL_NUM_THREADS=2):
        found = gdal.settings(str(path))
    assert not {"GDAL_CACHEMAX", "GDAL_NUM_THREADS"} & found.keys()
    remote = gdal.settings("/vsicurl/http://host/a.TIF?x=1")
    assert remote["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"
    assert remote["CPL_VSIL_CURL_ALLOWED_EXTENSIONS"] == ".tif,.tiff"
    assert "CPL_VSIL_CURL_ALLOWED_EXTENSIONS" not in gdal.settings("s3://host/a.vrt")


WITHOUT = """
import sys
sys.modules["rasterio"] = None
import xsmae, xsmae.data.geotiff
from xsmae.errors import UserError
try:
    xsmae.open_raster(sys.argv[1])
except UserError as error:
    print(error)
"""


def test_without_rasterio(path):
    write(path, land(8, 8))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "pip install 'xsmae[geo]'" in done.stdout


def test_other_formats(tmp_path):
    data = land(16, 24)
    tif = write(tmp_path / "a.tif", data)
    from rasterio.shutil import copy

    for driver, name in (("PNG", "a.png"), ("VRT", "a.vrt"), ("ENVI", "a.img")):
        with rasterio.Env():
            copy(tif, tmp_path / name, driver=driver)
        with open_raster(tmp_path / name, bands=("a", "b", "c"), gsd=1) as raster:
            values, valid = whole(raster)
            assert np.array_equal(values, np.moveaxis(data, 0, -1) / np.float32(255))
            assert valid.all()


def test_a_file_that_changes_is_not_mixed_up(path):
    write(path, land(16, 16))
    raster = open_raster(path)
    raster.close()
    write(path, land(16, 16), compress="deflate")
    os.utime(path, (1, 1))
    with pytest.raises(BadImageError, match="open it again"):
        whole(raster)
