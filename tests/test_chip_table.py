"""The table of a scene's chips: columns, metadata, order, readers, geometry."""

import csv
import datetime
import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.support.raster_table import OPTIONS
from tests.support.rasters import REASON, land, north_up, unpack, write
from tests.test_real_rasters import has
from xsmae.data.raster import open_raster
from xsmae.scenes.chip_table import (
    Chips,
    ChipTable,
    SceneFacts,
    hilbert_order,
    rows_per_group,
)
from xsmae.scenes.outlines import box_of, can_be_placed, outlines

rasterio = pytest.importorskip("rasterio", reason=REASON)
shapely = pytest.importorskip("shapely")
pyproj = pytest.importorskip("pyproj")

SIDE = 8
EMB = {"emb:type": "chip", "emb:dimensions": 3, "data_type": "float32"}


def windows_of(raster, side):
    height, width = raster.shape
    return np.array(
        [
            (top, left, side, side)
            for top in range(0, height - side + 1, side)
            for left in range(0, width - side + 1, side)
        ]
    )


def write_table(path, raster, *, dtype="float32", groups=1, time=None):
    windows = windows_of(raster, SIDE)
    rng = np.random.default_rng(0)
    scale = None
    vectors = rng.normal(size=(len(windows), 3)).astype(np.float32)
    if dtype == "int8":
        scale = np.abs(vectors).max(axis=1) / 127
        vectors = np.rint(vectors / scale[:, None])
    vectors = vectors.astype(dtype)
    facts = SceneFacts("a", "scenes/a.tif", time, raster.crs, (SIDE, SIDE))
    found = outlines(raster, windows)
    with ChipTable(path, facts, EMB) as table:
        for part in np.array_split(np.arange(len(windows)), groups):
            table.add(
                Chips(
                    embedding=vectors[part],
                    scale=None if scale is None else scale[part],
                    outlines=[found[i] for i in part],
                    place=windows[part, :2],
                    gsd=np.full((len(part), 2), (10.0, 5.0)),
                    valid_fraction=np.linspace(0.5, 1, len(part)),
                )
            )
    return windows, vectors, found


@pytest.fixture
def raster(tmp_path):
    with open_raster(write(tmp_path / "a.tif", land(24, 32))) as raster:
        yield raster


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_the_columns(tmp_path, raster, dtype):
    time = datetime.datetime(2020, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    path = tmp_path / "a.parquet"
    windows, vectors, _ = write_table(path, raster, dtype=dtype, time=time)
    table = pa.parquet.read_table(path)
    names = [
        "id", "embedding", "scale", "geometry", "bbox", "source", "datetime", "crs",
        "row", "col", "height", "width", "gsd_x", "gsd_y", "valid_fraction",
    ]  # fmt: skip
    if dtype != "int8":
        names.remove("scale")
    assert table.schema.names == names
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 3)
    assert table.schema.field("embedding").type == kind
    got = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 3)
    np.testing.assert_array_equal(got, vectors)
    assert table["id"].to_pylist()[:2] == ["a_0_0", "a_0_8"]
    place = np.column_stack([table["row"].to_numpy(), table["col"].to_numpy()])
    np.testing.assert_array_equal(place, windows[:, :2])
    row = table.slice(5, 1).to_pylist()[0]
    assert (row["height"], row["width"], row["crs"]) == (SIDE, SIDE, "EPSG:32633")
    assert (row["gsd_y"], row["gsd_x"]) == (10.0, 5.0)
    assert (row["datetime"], row["source"]) == (time, "scenes/a.tif")
    assert shapely.from_wkb(row["geometry"]).bounds == tuple(row["bbox"].values())
    assert table["valid_fraction"].to_pylist()[-1] == 1.0


def test_the_metadata(tmp_path, raster):
    path = tmp_path / "a.parquet"
    _, _, found = write_table(path, raster, groups=3)
    file = pa.parquet.ParquetFile(path)
    assert file.num_row_groups == 3
    assert file.metadata.row_group(0).column(1).compression == "ZSTD"
    told = file.metadata.metadata
    assert json.loads(told[b"emb"]) == EMB
    geo = json.loads(told[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    assert column["bbox"] == pytest.approx(box_of(found))
    assert "crs" not in column  # longitude and latitude of WGS 84, by the standard
    # Readers skip row groups by the smallest and the largest corners.
    names = {
        file.metadata.row_group(0).column(i).path_in_schema: i
        for i in range(file.metadata.num_columns)
    }
    for side in ("xmin", "ymin", "xmax", "ymax"):
        part = file.metadata.row_group(0).column(names[f"bbox.{side}"])
        assert part.statistics.has_min_max
    assert not file.metadata.row_group(0).column(1).is_stats_set


def test_the_same_rows_give_the_same_bytes(tmp_path, raster):
    for name in "ab":
        write_table(tmp_path / f"{name}.parquet", raster, groups=2)
    first, second = ((tmp_path / f"{n}.parquet").read_bytes() for n in "ab")
    assert first == second


def test_without_a_place_the_geometry_is_null(tmp_path):
    path = write(tmp_path / "a.tif", land(16, 16), crs=None)
    with open_raster(path) as raster:
        assert not can_be_placed(raster)
        write_table(tmp_path / "a.parquet", raster)
    table = pa.parquet.read_table(tmp_path / "a.parquet")
    for name in ("geometry", "bbox", "crs", "datetime"):
        assert table[name].null_count == 4
    geo = json.loads(pa.parquet.read_metadata(tmp_path / "a.parquet").metadata[b"geo"])[
        "columns"
    ]["geometry"]
    assert geo["geometry_types"] == []
    assert "bbox" not in geo


def test_duckdb_and_geopandas_read_it(tmp_path, raster):
    duckdb = pytest.importorskip("duckdb")
    geopandas = pytest.importorskip("geopandas")
    for dtype in ("float16", "float32", "int8"):
        path = tmp_path / f"{dtype}.parquet"
        windows, vectors, _ = write_table(path, raster, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = duckdb.sql(
                f"select embedding, row from '{path}' where bbox.xmin > -180"
            ).fetchall()
            frame = geopandas.read_parquet(path)
            west, south, _, _ = frame.total_bounds
            near = geopandas.read_parquet(
                path, bbox=(west, south, west + 1e-5, south + 1e-5)
            )
        np.testing.assert_allclose([row[0] for row in rows], vectors, atol=1e-3)
        assert len(frame) == len(windows)
        assert frame.crs.to_epsg() == 4326 or frame.crs.to_string() == "OGC:CRS84"
        assert len(near) == 1


def test_a_hilbert_curve_steps_to_neighbours():
    rows, columns = (x.ravel() for x in np.mgrid[:16, :16])
    order = hilbert_order(rows, columns)
    steps = np.abs(np.diff(rows[order])) + np.abs(np.diff(columns[order]))
    assert (steps == 1).all()
    assert sorted(order) == list(range(256))
    kept = rows != 3
    again = hilbert_order(rows[kept], columns[kept])
    left = [i for i in order if kept[i]]
    np.testing.assert_array_equal(np.flatnonzero(kept)[again], left)
    assert len(hilbert_order(rows[:0], columns[:0])) == 0
    assert rows_per_group(768, "float32") * 768 * 4 < 128 * 2**20


# Outlines, beside an independent computation with pyproj and shapely.


def farthest(raster, window, outline):
    """Pixels between the outline, put back into the raster, and its window."""
    back = pyproj.Transformer.from_crs("EPSG:4326", raster.crs, always_xy=True)
    top, left, height, width = window
    parts = []
    for ring in outline.rings:
        assert shapely.Polygon(ring).is_valid
        assert shapely.LinearRing(ring).is_ccw
        assert np.abs(ring[:, 0]).max() <= 180
        step = np.abs(np.ptp(ring, axis=0)).max() / 50
        dense = shapely.segmentize(shapely.LinearRing(ring), step)
        x, y = back.transform(*shapely.get_coordinates(dense).T)
        if pyproj.CRS(raster.crs).is_geographic:  # its longitudes may be above 180
            middle = raster.transform.c
            x = x + 360 * np.round((middle - x) / 360)
        a, b, c, d, e, f = (~raster.transform)[:6]
        x, y = a * x + b * y + c, d * x + e * y + f
        parts.append(shapely.Polygon(np.column_stack([x, y])))
    # Parts that meet at the antimeridian are joined by this little.
    whole = shapely.union_all([part.buffer(0.002) for part in parts])
    assert whole.geom_type == "Polygon"
    true = shapely.box(left, top, left + width, top + height)
    return shapely.hausdorff_distance(whole.exterior, true.exterior, densify=0.02)


@has("geotiff_small.zip")
def test_outlines_of_real_scenes(tmp_path_factory):
    folder = unpack("geotiff_small.zip", tmp_path_factory.mktemp("geotiff"))
    with (folder / "GEOTIFF.csv").open(newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    crossing, placed = 0, 0
    for name in names:
        with open_raster(folder / name, **OPTIONS.get(name, {})) as raster:
            side = min(64, *raster.shape)
            windows = windows_of(raster, side)
            windows = np.vstack([windows[:: len(windows) // 40 + 1], windows[-1:]])
            windows = np.vstack([windows, [(0, 0, *raster.shape)]])
            found = outlines(raster, windows)
            if not can_be_placed(raster):
                assert found == [None] * len(windows)
                continue
            placed += 1
            crossing += sum(outline.crosses for outline in found)
            for window, outline in zip(windows, found, strict=True):
                assert farthest(raster, window, outline) < 0.1, name
    assert (len(names), placed) == (35, 33)
    assert crossing > 1


ROTATED = (7.0, 4.0, 500_000.0, 4.0, -7.0, 5_000_000.0)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32633", ROTATED),
        ("EPSG:32633", (100.0, 3.0, 400_000.0, -5.0, -60.0, 8_900_000.0)),
        ("EPSG:4326", (0.02, 0.011, 10.0, 0.01, -0.02, 60.0)),
        ("EPSG:4326", north_up(179, -16, 0.05)),  # up to 184 degrees east
        ("EPSG:3857", north_up(1_000_000, 9_000_000, 1000)),
        ("EPSG:32701", north_up(-100_000, 8_200_000, 4000)),
        ("EPSG:3413", north_up(-1_000_000, 2_000_000, 5000)),  # polar, across 180
        ("EPSG:2263", north_up(980_000, 200_000, 300)),  # feet
    ],
)
def test_outlines_of_any_grid(tmp_path, crs, transform):
    path = write(tmp_path / "a.tif", land(96, 64), crs=crs, transform=transform)
    with open_raster(path) as raster:
        windows = np.vstack([windows_of(raster, 32), [(0, 0, *raster.shape)]])
        for window, outline in zip(windows, outlines(raster, windows), strict=True):
            assert farthest(raster, window, outline) < 0.1


@pytest.mark.parametrize("corner", [(-40, 40), (-50, 30), (0, 40), (-40, 20)])
def test_a_window_around_a_pole_reaches_it(tmp_path, corner):
    """Also where the pole is on an edge or a corner of the window."""
    place = north_up(corner[0] * 1000, corner[1] * 1000, 1000)
    path = write(tmp_path / "a.tif", land(80, 80), crs="EPSG:3031", transform=place)
    ground = pyproj.Geod(ellps="WGS84")
    with open_raster(path) as raster:
        for side in (80, 40):
            windows = windows_of(raster, side)
            for outline in outlines(raster, windows):
                polygons = [shapely.Polygon(ring) for ring in outline.rings]
                assert all(polygon.is_valid for polygon in polygons)
                areas = []
                for polygon in polygons:
                    dense = shapely.segmentize(polygon, 0.5)
                    areas.append(ground.geometry_area_perimeter(dense)[0])
                # The true scale is at 71 degrees south: pixels are smaller here.
                scale = raster.gsd[0] * raster.gsd[1]
                assert sum(areas) == pytest.approx(side**2 * scale, rel=0.02)


def test_a_box_across_the_antimeridian_goes_from_east_to_west(tmp_path):
    place = north_up(179, -16, 0.05)
    path = write(tmp_path / "a.tif", land(32, 64), crs="EPSG:4326", transform=place)
    with open_raster(path) as raster:
        found = outlines(raster, windows_of(raster, 8))
    assert sum(outline.crosses for outline in found) == 4
    west, south, east, north = box_of(found)
    assert (west, east) == pytest.approx((179, 182.2 - 360))
    assert (south, north) == pytest.approx((-17.6, -16))
    whole = north_up(-180, 90, 360 / 64)
    path = write(tmp_path / "world.tif", land(32, 64), crs="EPSG:4326", transform=whole)
    with open_raster(path) as raster:
        windows = np.array([(0, 0, 32, 64), (0, 0, 8, 8)])
        found = outlines(raster, windows)
    assert found[0].box == pytest.approx((-180, -90, 180, 90))
    assert box_of(found) == pytest.approx((-180, -90, 180, 90))
