"""Maps of embeddings: components, classes, differences, places, and what is refused."""

import json

import numpy as np
import pytest

import xsmae
from tests.support.embedded import SIZE, write_chips, write_patches
from tests.support.encoders import make_encoder
from tests.support.rasters import REASON, UTM
from tests.support.scenes import call, contents, make_scene
from xsmae import cli
from xsmae.errors import UserError
from xsmae.figures.embedding_map import SIDE, View, draw_difference
from xsmae.scenes import components, embedding_files, sample, stored
from xsmae.scenes.components import fit_components
from xsmae.scenes.kmeans import fit_centres
from xsmae.scenes.sample import Sample

rasterio = pytest.importorskip("rasterio", reason=REASON)

WIDTH = 24
ROTATED = (8.0, 6.0, 500_000.0, 6.0, -8.0, 5_000_000.0)


def random_grid(rows, columns, seed=0):
    """Vectors with directions of different variance."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(rows, columns, WIDTH)) * np.geomspace(3, 0.1, WIDTH)
    return (found + rng.normal(size=WIDTH)).astype(np.float32)


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def read(path):
    with rasterio.open(path) as raster:
        return raster.read()


def command(*words):
    return cli.main(["xsmae", "map", *map(str, words)])


def by_svd(scenes):
    """Colours of all cells from the singular vectors of all vectors at once."""
    flat = unit(np.concatenate([s.reshape(-1, WIDTH) for s in scenes]))
    centred = flat - flat.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    greatest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(3), greatest])[:, None]
    scores = centred @ axes.T
    low, high = np.percentile(scores, 2, axis=0), np.percentile(scores, 98, axis=0)
    colours = 1 + 254 * np.clip((scores - low) / (high - low), 0, 1)
    ends = np.cumsum([s.shape[0] * s.shape[1] for s in scenes])[:-1]
    parts = np.split(colours, ends)
    share = values[:3] ** 2 / (values**2).sum()
    return [p.reshape(*s.shape[:2], 3) for p, s in zip(parts, scenes, strict=True)], (
        share
    )


# Components


@pytest.mark.parametrize("write", [write_chips, write_patches])
def test_components_are_those_of_all_vectors(tmp_path, write):
    scenes = [random_grid(9, 7), random_grid(4, 5, seed=1) + 0.3]
    for name, vectors in zip("ab", scenes, strict=True):
        write(tmp_path / "in", name, vectors)
    lines = []
    maps = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out", say=lines.append)
    expected, share = by_svd(scenes)
    for found, colours in zip(maps, expected, strict=True):
        got = read(found.raster).transpose(1, 2, 0).astype(float)
        np.testing.assert_allclose(got, colours, atol=0.51)
        np.testing.assert_allclose(found.facts["variance"], share, rtol=1e-4)
        assert found.picture.read_bytes()[1:4] == b"PNG"
    assert any("83" in line and "2 scenes" in line for line in lines)
    with rasterio.open(maps[0].raster) as got:
        assert got.nodata == 0
        assert [c.name for c in got.colorinterp] == ["red", "green", "blue"]
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert got.dtypes == ("uint8",) * 3


def test_the_size_of_blocks_and_the_dtype_change_no_colour(tmp_path, monkeypatch):
    vectors = random_grid(12, 11)
    vectors[3:5, 2] = np.nan
    monkeypatch.setattr(sample, "BYTES", 4 * WIDTH * 60)  # 60 of 130 chips
    found = {}
    for rows, dtype in ((8192, "float32"), (7, "float32"), (8192, "int8")):
        monkeypatch.setattr(stored, "BATCH", rows)
        folder = tmp_path / f"{rows}_{dtype}"
        write_chips(folder / "in", "a", vectors, dtype=dtype)
        (one,) = xsmae.map_embeddings(folder / "in", folder / "out")
        found[rows, dtype] = read(one.raster)
    whole = found[8192, "float32"]
    np.testing.assert_array_equal(whole, found[7, "float32"])
    assert np.abs(whole.astype(int) - found[8192, "int8"]).mean() < 2
    np.testing.assert_array_equal((whole == 0).all(axis=0), np.isnan(vectors[..., 0]))
    assert whole[:, ~np.isnan(vectors[..., 0])].min() == 1


def test_a_sample_does_not_depend_on_blocks(monkeypatch):
    monkeypatch.setattr(sample, "BYTES", 4 * 3 * 50)
    vectors = np.arange(900, dtype=np.float32).reshape(300, 3)
    found = []
    for step in (300, 50, 7):
        some = Sample(3)
        for start in range(0, 300, step):
            some.add(vectors[start : start + step])
        found.append(some.vectors)
    assert found[0].shape == (50, 3)
    assert 100 < found[0][:, 0].mean() / 3 < 200
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_vectors_that_are_all_the_same_are_grey(tmp_path):
    write_chips(tmp_path / "in", "a", np.ones((3, 4, WIDTH)))
    (found,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(read(found.raster), 128)
    assert found.facts["variance"] == [0, 0, 0]


def test_sums_of_squares_lose_no_digits():
    rng = np.random.default_rng(0)
    vectors = 1e4 + rng.normal(size=(500, 5)) * (3, 2, 1, 0.1, 0.1)
    found = fit_components(np.array_split(vectors, 13))
    values = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))
    np.testing.assert_allclose(
        found.variance, values[::-1][: components.COUNT] / values.sum(), rtol=1e-9
    )


# Classes


def blobs(rows, columns, seed=0):
    """A grid of four classes that are far from each other, and the classes."""
    rng = np.random.default_rng(seed)
    centres = np.eye(WIDTH)[:4] * 5
    truth = rng.choice(4, (rows, columns), p=(0.4, 0.3, 0.2, 0.1))
    return centres[truth] + rng.normal(size=(rows, columns, WIDTH)) * 0.2, truth


def test_classes_recover_blobs_and_are_the_same_again(tmp_path):
    vectors, truth = blobs(20, 15)
    write_chips(tmp_path / "in", "a", vectors)
    vectors[2, 3:5] = np.nan
    write_patches(tmp_path / "grids", "b", vectors)
    options = {"kind": "classes", "classes": 4}
    (found,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "one", **options)
    order = np.argsort(-np.bincount(truth.ravel()))
    classes = read(found.raster)[0]
    np.testing.assert_array_equal(order[classes], truth)
    shares = np.bincount(classes.ravel()) / classes.size
    np.testing.assert_allclose(found.facts["shares"], shares)
    assert (np.diff(shares) <= 0).all()
    xsmae.map_embeddings(tmp_path / "in", tmp_path / "two", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (other,) = xsmae.map_embeddings(tmp_path / "grids", tmp_path / "one", **options)
    with rasterio.open(other.raster) as got:
        assert got.nodata == 255
        assert len({got.colormap(1)[i] for i in range(4)}) == 4
        assert got.colormap(1)[255][3] == 0
        np.testing.assert_array_equal(got.read(1) == 255, np.isnan(vectors[..., 0]))
    names = (tmp_path / "one" / "b_kmeans.tif.aux.xml").read_text()
    assert names.count("<Category>class ") == 4


def test_as_many_classes_as_different_vectors():
    vectors = np.repeat(np.eye(5, dtype=np.float32), 20, axis=0)
    centres = fit_centres(vectors, 5)
    np.testing.assert_allclose(np.sort(centres @ np.arange(5)), np.arange(5))


# Differences


def difference(folder, *scenes, **options):
    lines = []
    (found,) = xsmae.map_embeddings(
        folder / "in",
        folder / "out",
        kind="difference",
        scenes=scenes,
        say=lines.append,
        **options,
    )
    return found, read(found.raster)[0], lines


def test_a_changed_corner_is_where_the_difference_is(tmp_path):
    before = random_grid(8, 9)
    after = before.copy()
    after[:2, :3] *= -1
    before[7, 8] = np.nan
    after[7, 7] = np.nan
    order = np.random.default_rng(0).permutation(71)
    write_chips(tmp_path / "in", "before", before, order=order)
    write_chips(tmp_path / "in", "after", after)
    found, values, lines = difference(tmp_path, "before", "after")
    assert found.raster.name == "before_to_after_difference.tif"
    np.testing.assert_array_equal(
        np.isnan(values), np.isnan(before[..., 0]) | np.isnan(after[..., 0])
    )
    known = ~np.isnan(values)
    expected = 1 - (unit(before) * unit(after)).sum(axis=-1)
    np.testing.assert_allclose(values[known], expected[known], atol=1e-6)
    np.testing.assert_allclose(values[:2, :3], 2, atol=1e-6)
    assert np.abs(values[known] - 2 * (expected > 1)[known]).max() < 1e-6
    assert found.facts == {
        "mean": pytest.approx(12 / 70), "cells": 70, "share": pytest.approx(70 / 71),
    }  # fmt: skip
    assert any("0.1714" in line and "98.6%" in line for line in lines)
    assert not any("differ:" in line for line in lines)
    _, values, _ = difference(tmp_path, "before", "before")
    assert (values[np.isfinite(before[..., 0])] == 0).all()
    with rasterio.open(found.raster) as got:
        assert got.dtypes == ("float32",)
        assert np.isnan(got.nodata)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
def test_another_grid_is_sampled_at_the_centres(tmp_path, crs):
    """The second scene is a part of the first, shifted by a few pixels."""
    from rasterio import warp

    vectors = random_grid(6, 8)
    write_chips(tmp_path / "in", "a", vectors)
    x, y = UTM[2] + (2 * SIZE + 3) * 10, UTM[5] - (SIZE - 2) * 10
    transform = (10, 0, x, 0, -10, y)
    if crs != "EPSG:32633":
        xs, ys = warp.transform("EPSG:32633", crs, [x, x + 1000, x], [y, y, y - 1000])
        dx, dy = (xs[1] - xs[0]) / 100, (ys[2] - ys[0]) / 100
        transform = (dx, 0, xs[0], 0, dy, ys[0])
    write_chips(tmp_path / "in", "b", vectors[1:4, 2:6], transform=transform, crs=crs)
    found, values, lines = difference(tmp_path, "a", "b")
    inside = np.zeros((6, 8), bool)
    inside[1:4, 2:6] = True
    np.testing.assert_array_equal(np.isfinite(values), inside)
    assert (values[inside] == 0).all()
    assert found.facts["share"] == pytest.approx(12 / 48)
    assert any("differ" in line for line in lines)
    with rasterio.open(found.raster) as got:
        assert got.crs.to_epsg() == 32633


def test_zeros_have_no_direction(tmp_path):
    vectors = random_grid(2, 3)
    write_chips(tmp_path / "in", "a", vectors)
    vectors[0, 0] = 0
    write_chips(tmp_path / "in", "b", vectors)
    _, values, _ = difference(tmp_path, "a", "b")
    np.testing.assert_array_equal(values, [[1, 0, 0], [0, 0, 0]])


# Places


@pytest.mark.parametrize("transform", [UTM, ROTATED])
@pytest.mark.parametrize(("stride", "moved"), [(SIZE, 0), (SIZE, 5), (6, 2)])
def test_a_cell_is_around_the_centre_of_its_chip(tmp_path, transform, stride, moved):
    vectors = random_grid(5, 4)
    write_chips(
        tmp_path / "in", "a", vectors, stride=stride, moved=moved, transform=transform
    )
    (found,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")
    a, b, c, d, e, f = transform
    with rasterio.open(found.raster) as got:
        assert got.crs.to_epsg() == 32633
        assert got.shape == (5, 4)
        for row, column in np.ndindex(5, 4):
            top = row * stride - moved * (row == 4)
            left = column * stride - moved * (column == 3)
            x, y = left + SIZE / 2, top + SIZE / 2
            centre = a * x + b * y + c, d * x + e * y + f
            cell = np.array(got.xy(row, column))
            away = np.hypot(*(cell - centre)) / 10
            assert away == pytest.approx(
                moved * np.sqrt((row == 4) + (column == 3)), abs=1e-6
            )


def test_cells_of_patches_are_those_of_the_geotiff(tmp_path):
    write_patches(tmp_path / "in", "a", random_grid(5, 4), transform=ROTATED)
    (found,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")
    with (
        rasterio.open(tmp_path / "in" / "a.tif") as given,
        rasterio.open(found.raster) as got,
    ):
        assert got.transform.almost_equals(given.transform, 1e-6)
        assert got.crs == given.crs


def test_scenes_without_a_crs(tmp_path):
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    for name, rows in (("a", 4), ("b", 4), ("c", 3)):
        grid = random_grid(rows, 5)
        write_chips(tmp_path / "in", name, grid, crs=None, transform=identity)
    maps = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")
    with rasterio.open(maps[0].raster) as got:
        assert got.crs is None
    assert all(one.picture.exists() for one in maps)
    _, values, _ = difference(tmp_path, "a", "b")
    assert (values == 0).all()
    with pytest.raises(UserError, match="one size"):
        difference(tmp_path, "a", "c")
    write_chips(tmp_path / "in", "d", random_grid(4, 5))
    with pytest.raises(UserError, match="a has no place on Earth, d has one"):
        difference(tmp_path, "d", "a")


# Real embeddings


@pytest.mark.parametrize("unit_", ["chip", "token"])
def test_what_embed_wrote(tmp_path, unit_, capsys):
    encoder = make_encoder(
        tmp_path / "encoder", depth=1, position="gsd", reference_gsd=10.0
    )
    for name, height in (("a", 90), ("b", 58)):
        make_scene(tmp_path / "scenes" / f"{name}.tif", height)
        words = [tmp_path / "scenes" / f"{name}.tif", f"--encoder={encoder}"]
        words += ["--chip_size=16", f"--unit={unit_}", "--dtype=int8"]
        assert call(*words, f"--out={tmp_path}/in") == 0
    capsys.readouterr()
    words = [f"--embeddings={tmp_path}/in", f"--out={tmp_path}/out"]
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out/a_components.tif\n" in printed
    assert "is not drawn" not in printed
    assert command(*words, "--kind=classes", "--classes=3") == 0
    assert command(*words, "--kind=difference", "--scene=b", "--scene=a") == 0
    before = contents(tmp_path / "out")
    assert len(before) == 4 + 6 + 2
    capsys.readouterr()
    assert command(*words) == 0
    assert capsys.readouterr().out.count("was there") == 4
    assert contents(tmp_path / "out") == before
    manifest = json.loads((tmp_path / "in" / "manifest.json").read_text())
    with rasterio.open(tmp_path / "out" / "a_kmeans.tif") as got:
        count = (got.read(1) != 255).sum()
    assert count == manifest["scenes"]["a"]["rows"]
    with rasterio.open(tmp_path / "out" / "b_to_a_difference.tif") as got:
        assert got.shape == ((4, 5) if unit_ == "chip" else (15, 18))


def test_a_scene_that_moved_is_not_drawn(tmp_path):
    write_chips(tmp_path / "in", "a", random_grid(3, 3))
    lines = []
    options = {"say": lines.append}
    (found,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "out", **options)
    assert any("a is not drawn: does not exist" in line for line in lines)
    make_scene(tmp_path / "a_scene.tif", 3 * SIZE, 3 * SIZE)
    lines.clear()
    (drawn,) = xsmae.map_embeddings(tmp_path / "in", tmp_path / "two", **options)
    assert not any("not drawn" in line for line in lines)
    assert read(drawn.raster).tolist() == read(found.raster).tolist()
    assert drawn.picture.read_bytes() != found.picture.read_bytes()
    make_scene(tmp_path / "a_scene.tif", 50, 50)
    xsmae.map_embeddings(tmp_path / "in", tmp_path / "three", **options)
    assert any("50 x 50 pixels" in line for line in lines)


def test_a_picture_is_bounded(tmp_path):
    values = np.zeros((SIDE * 3, SIDE * 2), np.float32)
    values[:, 0] = np.nan
    view = View("many cells", [], values.shape, (10, 10), (0, 2 * SIDE, 0, 3 * SIDE),
                (10, 10), "patch")  # fmt: skip
    from PIL import Image

    draw_difference(tmp_path / "a.png", view, values)
    with Image.open(tmp_path / "a.png") as image:
        assert max(image.size) < 3000


# What is refused


def fails(folder, *words):
    return command(f"--embeddings={folder}", f"--out={folder.parent}/out", *words)


def test_arguments_that_do_not_fit(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in "ab":
        write_chips(folder, name, random_grid(2, 2))
    for words, said in (
        (["--kind=classes", "--classes=1"], "classes=1, expected 2 to 64"),
        (["--kind=classes", "--classes=5"], "only 4 vectors differ"),
        (["--classes=5"], "kind=classes"),
        (["--kind=difference"], "0 scenes given, expected two"),
        (["--kind=difference", "--scene=a"], "1 scenes given, expected two"),
        (["--scene=a", "--scene=a"], "given twice"),
        (["--scene=z"], "no scene z, expected one of a, b"),
        (["--kind=sizes"], "sizes"),
        (["more"], "more"),
    ):
        assert fails(folder, *words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert command() == 2
    assert "--embeddings is missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="kind='sizes'"):
        xsmae.map_embeddings(folder, tmp_path / "out", kind="sizes")
    out = tmp_path / "out"
    assert not out.exists() or contents(out) == {}


def break_footer(folder):
    write_chips(folder, "a", random_grid(2, 2), digest="b" * 16)


def break_size(folder):
    write_chips(folder, "a", random_grid(2, 2), pooling="cls")


def break_unit(folder):
    write_patches(folder, "b", random_grid(2, 2))


def break_table(folder):
    path = folder / "a.parquet"
    path.write_bytes(path.read_bytes()[:200])


def break_scene(folder):
    write_chips(folder, "a", random_grid(2, 2), scene={"shape": [32, 32]})


def break_grid(folder):
    scene = {"shape": [SIZE + 1, 2 * SIZE], "transform": [10, 0, 5e5, 0, -10, 5e6],
             "gsd": [10, 10], "datetime": None, "source": "a.tif"}  # fmt: skip
    write_chips(folder, "a", random_grid(2, 2), scene=scene)


def break_numbers(folder):
    vectors = random_grid(2, 2)
    vectors[0, 0, 1] = np.inf
    write_chips(folder, "a", vectors)


def break_raster(folder):
    (folder / "c.tif").write_bytes(b"II*\0 no raster")


def break_folder(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_footer, "has bbbb"),
        (break_size, "the pooling"),
        (break_unit, "each chip"),
        (break_table, "a.parquet cannot be read"),
        (break_scene, "a.parquet does not say where its scene lies ('transform')"),
        (break_grid, "a.parquet has chips that are not in its grid"),
        (break_numbers, "not finite"),
        (break_raster, "c.tif"),
        (break_folder, "has no embeddings"),
    ],
)
def test_embeddings_that_cannot_be_mapped(tmp_path, capsys, damage, said):
    folder = tmp_path / "in"
    for name in "az":
        write_chips(folder, name, random_grid(2, 2))
    damage(folder)
    assert fails(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.glob("out/*.tif"))


def test_scenes_without_a_vector(tmp_path):
    write_patches(tmp_path / "in", "a", np.full((3, 3, WIDTH), np.nan))
    with pytest.raises(UserError, match="no cell of a"):
        xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")
    options = {"kind": "difference", "scenes": ["a", "a"]}
    with pytest.raises(UserError, match="no vectors of the same ground"):
        xsmae.map_embeddings(tmp_path / "in", tmp_path / "out", **options)
    write_chips(tmp_path / "chips", "a", np.full((3, 3, WIDTH), np.nan))
    with pytest.raises(UserError, match="has no chips"):
        xsmae.map_embeddings(tmp_path / "chips", tmp_path / "out")


def test_another_geotiff_among_the_embeddings(tmp_path):
    write_chips(tmp_path / "in", "a", random_grid(2, 2))
    xsmae.map_embeddings(tmp_path / "in", tmp_path / "in")
    with pytest.raises(UserError, match=r"a_components\.tif is no GeoTIFF"):
        xsmae.map_embeddings(tmp_path / "in", tmp_path / "out")


def test_scenes_of_other_ground(tmp_path, capsys):
    write_chips(tmp_path / "in", "a", random_grid(3, 3))
    far = (10, 0, UTM[2] + 5000, 0, -10, UTM[5])
    write_chips(tmp_path / "in", "b", random_grid(3, 3), transform=far)
    hole = random_grid(3, 3)
    hole[:, 1:] = np.nan
    write_chips(tmp_path / "in", "c", hole)
    hole = random_grid(3, 3)
    hole[:, :1] = np.nan
    write_chips(tmp_path / "in", "d", hole)
    for one, other, said in (
        ("a", "b", "no common ground"), ("c", "d", "no vectors of the same ground"),
    ):  # fmt: skip
        words = ["--kind=difference", f"--scene={one}", f"--scene={other}"]
        assert fails(tmp_path / "in", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert f"{one} and {other}" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_a_map_of_something_else_stays(tmp_path):
    write_chips(tmp_path / "in", "a", random_grid(3, 3))
    options = {"kind": "classes", "classes": 2}
    xsmae.map_embeddings(tmp_path / "in", tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"a_kmeans\.tif is there"):
        xsmae.map_embeddings(
            tmp_path / "in", tmp_path / "out", kind="classes", classes=3
        )
    assert contents(tmp_path / "out") == before
    # A picture that is lost is drawn again, with the same bytes.
    (tmp_path / "out" / "a_kmeans.png").unlink()
    xsmae.map_embeddings(tmp_path / "in", tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_stopped_or_on_a_full_disk_no_part_of_a_map_is_there(tmp_path, monkeypatch):
    write_chips(tmp_path / "in", "a", random_grid(3, 3))
    out = tmp_path / "out"
    for asked in range(2):  # in the fit, in the map
        calls = iter([False] * asked + [True])
        with pytest.raises(KeyboardInterrupt):
            xsmae.map_embeddings(
                tmp_path / "in", out, should_stop=lambda calls=calls: next(calls)
            )
        assert not out.exists() or contents(out) == {}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embedding_files, "write_cog", full)
        with pytest.raises(UserError, match="No space left"):
            xsmae.map_embeddings(tmp_path / "in", out)
    assert contents(out) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        xsmae.map_embeddings(tmp_path / "in", tmp_path / "file")
