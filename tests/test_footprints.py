"""Footprints of rasters: where they lie, which windows are used, and the map."""

import numpy as np
import pytest
from PIL import Image

from tests.support.rasters import REASON, land, north_up, write
from xsmae.data.footprints import HELD_OUT, LEFT_OUT, USED, find_footprints
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.figures.footprints import find_places, footprints_map

pytest.importorskip("rasterio", reason=REASON)

TILES = {"tiled": True, "blockxsize": 16, "blockysize": 16}


def area(polygon):
    """By the shoelace formula, in square degrees."""
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def footprints(folder, **options):
    return find_footprints(GeotiffSource(folder, window=16, **options))


def test_the_box_is_that_of_the_raster(tmp_path):
    degrees = north_up(10, 50, 0.01)
    write(tmp_path / "a.tif", land(40, 30), crs="EPSG:4326", transform=degrees)
    (found,), missing = footprints(tmp_path)
    assert missing == {}
    assert found.name == "a.tif"
    np.testing.assert_allclose(found.box, (10, 49.6, 10.3, 50))
    assert [kind for _, kind in found.windows] == [USED]


def test_a_rotated_raster_is_rotated(tmp_path):
    """A square on a corner has half the area of its box."""
    side = 0.01 * 0.5**0.5
    transform = (side, side, 10, side, -side, 50)
    write(tmp_path / "a.tif", land(32, 32), crs="EPSG:4326", transform=transform)
    (found,), _ = footprints(tmp_path)
    west, south, east, north = found.box
    assert east - west == pytest.approx(0.32 * 2**0.5)
    assert area(found.outline) == pytest.approx((east - west) * (north - south) / 2)


def test_edges_follow_the_projection(tmp_path):
    """The top of a wide raster in UTM, which is no parallel of latitude."""
    wide = north_up(300_000, 5_500_000, 12_500)
    write(tmp_path / "a.tif", land(16, 32), crs="EPSG:32633", transform=wide)
    (found,), _ = footprints(tmp_path)
    corner, middle = found.outline[[0, 8]]
    # x^2 / 2R * tan(latitude), 200 km from the central meridian.
    assert middle[1] - corner[1] == pytest.approx(0.033, abs=0.002)


def test_across_the_antimeridian_it_is_one_piece(tmp_path):
    for name, west in (("a", 179.9), ("b", -179.95), ("c", 179.0)):
        place = north_up(west, 10, 0.01)
        write(tmp_path / f"{name}.tif", land(16, 32), crs="EPSG:4326", transform=place)
    found, missing = footprints(tmp_path)
    assert missing == {}
    boxes = np.array([f.box for f in found])
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], 0.32)
    wests = boxes[:, 0] % 360
    np.testing.assert_allclose(wests, [179.9, 180.05, 179.0])
    assert np.ptp(boxes[:, 0]) == pytest.approx(1.05)


def test_rasters_without_a_place_are_named(tmp_path):
    pole = north_up(-80_000, 80_000, 10_000)
    write(tmp_path / "pole.tif", land(16, 16), crs="EPSG:3995", transform=pole)
    write(tmp_path / "none.tif", land(16, 16), crs=None)
    write(tmp_path / "here.tif", land(16, 16))
    found, missing = footprints(tmp_path, gsd=10)
    assert [f.name for f in found] == ["here.tif"]
    assert missing == {"none.tif": "no CRS", "pole.tif": "it contains a pole"}


def test_what_becomes_of_each_window(tmp_path):
    """32 x 48 pixels in windows of 16: two are left out, the rest by their raster."""
    for name in "abcd":
        data = land(32, 48)
        data[:, :16, 16:] = 0
        write(tmp_path / f"{name}.tif", data, nodata=0, **TILES)
    source = GeotiffSource(tmp_path, window=16, split="train", test_fraction=0.25)
    found, _ = find_footprints(source, {source.id(0)})
    areas = {}
    for footprint in found:
        for polygon, kind in footprint.windows:
            windows = round(area(polygon) / area(footprint.outline) * 6)
            areas[kind] = areas.get(kind, 0) + windows
    # One raster is of the test split, and one window is held out.
    assert areas == {LEFT_OUT: 8, HELD_OUT: 4 + 1, USED: 3 * 4 - 1}


def test_places_and_the_map(tmp_path):
    root = tmp_path / "rasters"
    root.mkdir()
    for i in range(4):
        place = north_up(500_000 + 1_000 * (i // 2) ** 4, 5_000_000, 10)
        data = land(32, 32)
        data[:, :16, :] = 0
        write(root / f"{i}.tif", data, transform=place, nodata=0, **TILES)
    found, _ = footprints(root)
    assert [[f.name for f in place] for place in find_places(found)] == [
        ["0.tif", "1.tif"], ["2.tif", "3.tif"],
    ]  # fmt: skip
    footprints_map(tmp_path / "map.png", found, {"lost.tif": "no CRS"})
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.height > 1000  # the map, and a row of places
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = set(map(tuple, np.unique(pixels, axis=0).tolist()))
    # Used windows are blue and those that are left out grey.
    assert any(blue > red + 90 for red, _, blue in colours)
    assert (224, 224, 224) in colours
