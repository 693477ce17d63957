"""Search: the exact hits, filters, queries, and what is refused."""

import json
import tracemalloc

import numpy as np
import pytest

import xsmae
from tests.support.chip_tables import HALF, SIDE, TIME, around, write_table
from xsmae.errors import UserError
from xsmae.scenes import search, stored
from xsmae.scenes.exact import nearest
from xsmae.scenes.places import (
    Box,
    Places,
    distances,
    far_from,
    holds,
    outline_of,
)
from xsmae.scenes.search import best_rows
from xsmae.scenes.stored import Stored

WIDTH = 24


def line_of(count, west=10.0, step=0.01):
    """Places beside each other along a parallel."""
    return [(west + step * i, 47.0) for i in range(count)]


def random_vectors(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Three tables of 50, 7 and 30 chips."""
    vectors = random_vectors(87)
    parts = {"a": slice(0, 50), "b": slice(50, 57), "c": slice(57, 87)}
    for west, (name, part) in enumerate(parts.items(), 10):
        some = vectors[part]
        path = tmp_path / "embeddings" / f"{name}.parquet"
        write_table(path, some, line_of(len(some), west), groups=2)
    return tmp_path / "embeddings"


def cosines(vectors, query):
    """In float64, by NumPy alone."""
    vectors, query = np.asarray(vectors, float), np.asarray(query, float)
    length = np.linalg.norm(vectors, axis=1)
    near = vectors @ query / np.linalg.norm(query)
    return near / np.where(length > 0, length, 1)


# Exact


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_hits_are_those_of_numpy(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 4 * WIDTH * 16)  # 16 rows
    monkeypatch.setattr(stored, "BATCH", 10)
    vectors = random_vectors(150) * np.geomspace(1e-3, 1e3, 150)[:, None]
    vectors[40] = 0
    if dtype == "float16":
        vectors = vectors.astype(np.float16)
    for name, part in (("a", slice(0, 90)), ("b", slice(90, 150))):
        some = vectors[part]
        write_table(
            tmp_path / f"{name}.parquet",
            some,
            line_of(len(some)),
            dtype=dtype,
            groups=4,
        )
    tables = Stored.open(tmp_path)
    chunks = list(tables.chunks())
    assert {chunk.numbers.shape for chunk in chunks} == {(16, WIDTH)}
    assert chunks[0].numbers.dtype == dtype
    rows = np.concatenate([chunk.rows for chunk in chunks])
    np.testing.assert_array_equal(rows[rows >= 0], np.arange(150))
    near = np.concatenate([chunk.numbers for chunk in chunks])[rows >= 0]
    asked = random_vectors(3, seed=1)
    scores, found = nearest(tables.chunks(), asked, 20)
    for query, score, row in zip(asked, scores, found, strict=True):
        expected = cosines(near, query)
        order = np.argsort(-expected, kind="stable")[:20]
        np.testing.assert_array_equal(row, order)
        np.testing.assert_allclose(score, expected[order], atol=1e-6)
    scores, found = nearest(tables.chunks(), asked[:1], 150)
    assert sorted(found[0]) == list(range(150))
    assert scores[0, list(found[0]).index(40)] == 0
    # The direction of a row of int8 does not depend on its scale.
    unit = stored.unit(vectors.astype(np.float32))
    np.testing.assert_allclose(
        tables.vectors([3, 140, 7]), unit[[3, 140, 7]], atol=0.01
    )


def test_tables_of_two_dtypes_and_equal_chips(tmp_path):
    vectors = random_vectors(8)
    for name, dtype in (("a", "float32"), ("b", "float16"), ("c", "float32")):
        write_table(tmp_path / f"{name}.parquet", vectors, line_of(8), dtype=dtype)
    tables = Stored.open(tmp_path)
    rows = best_rows(tables, vectors[2], 3)
    assert {row for row, _ in rows} == {2, 10, 18}
    _, found = nearest(tables.chunks(), np.ones((1, WIDTH)), 100)
    assert sorted(found[0][found[0] >= 0]) == list(range(24))
    write_table(tmp_path / "b.parquet", vectors, line_of(8))
    rows = best_rows(Stored.open(tmp_path), vectors[2], 3)
    assert [row for row, _ in rows] == [2, 10, 18]  # of equals the earlier one


def test_memory_is_that_of_a_few_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 2**20)
    many = 60_000
    vectors = np.ones((many, WIDTH), np.float32)
    write_table(tmp_path / "a.parquet", vectors, [None] * many, groups=4)
    tables = Stored.open(tmp_path)
    tracemalloc.start()
    for _ in tables.chunks():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20 < vectors.nbytes


# Places


def test_boxes_across_the_antimeridian():
    import pyarrow as pa

    from xsmae.scenes.chip_table import _boxes

    centres = [(179.5, 0), (180.0, 0), (-179.5, 0), (0, 60), (179.5, 60), None]
    shapes = [None if c is None else around(*c) for c in centres]
    table = pa.table(
        {
            "bbox": _boxes(shapes),
            "geometry": pa.array([None if s is None else s.wkb() for s in shapes]),
        }
    )
    places = Places.of(table)
    for box, expected in (
        ((179, -1, -179, 1), [0, 1, 2]),
        ((179.9, -1, -179.9, 1), [1]),
        ((-1, -90, 1, 90), [3]),
        ((-180, -90, 180, 90), [0, 1, 2, 3, 4]),
        ((179.5, -1, 179.8, 90), [0, 4]),
        ((-179.9995, -1, -179.9, 1), [1]),
    ):
        found = np.flatnonzero(places.in_box(Box.of(box)))
        assert list(found) == expected, box
    centres = [c or (np.nan, np.nan) for c in centres]
    np.testing.assert_allclose(places.centres(), centres, atol=1e-9)
    assert [o.crosses for o in shapes if o] == [False, True, False, False, False]
    for shape in filter(None, shapes):
        again = outline_of(shape.wkb())
        np.testing.assert_array_equal(np.vstack(again.rings), np.vstack(shape.rings))
    for x in (179.9995, -179.9995):
        assert holds(shapes[1], x, 0.0005)
    assert not holds(shapes[1], 179.998, 0)
    assert not holds(shapes[1], 0, 0)


def test_distances_are_those_of_geodesics():
    pyproj = pytest.importorskip("pyproj")
    rng = np.random.default_rng(0)
    here = np.column_stack([rng.uniform(-180, 180, 50), rng.uniform(-89, 89, 50)])
    geod = pyproj.Geod(ellps="WGS84")
    for spread, tolerance in ((0.3, 1e-4), (30, 5e-3)):
        there = here + rng.uniform(-spread, spread, here.shape) * [1, 0.9]
        there[:, 1] = there[:, 1].clip(-90, 90)
        true = geod.inv(*here.T, *there.T)[2]
        found = np.diagonal(distances(here, there))
        np.testing.assert_allclose(found, true, rtol=tolerance)
    assert far_from(here, here[:1], 1.0).sum() == 49
    assert not far_from(np.full((1, 2), np.nan), here[:0], 1.0).any()


def test_hits_of_a_box(folder):
    tables = Stored.open(folder)
    query = random_vectors(1, seed=5)[0]
    rows = best_rows(tables, query, 100, box=Box(11.0, 46, 11.0351, 48))
    # Chips 0 to 3 of b; the box of the fifth begins at 11.039.
    in_b = {50, 51, 52, 53}
    in_a = {row for row, _ in rows} - in_b
    assert in_b <= {row for row, _ in rows}
    assert not in_a
    everything = best_rows(tables, query, 100)
    order = [row for row, _ in everything if row in in_b]
    assert [row for row, _ in rows] == order
    assert best_rows(tables, query, 5, box=Box(-20, 0, -10, 1)) == []


@pytest.mark.parametrize("many", [0, 1, 5])
def test_hits_apart_are_those_of_the_greedy_choice(tmp_path, monkeypatch, many):
    monkeypatch.setattr(search, "MORE", many)
    monkeypatch.setattr(search, "SPARE", 2)
    rng = np.random.default_rng(0)
    centres = [tuple(x) for x in rng.uniform((10, 47), (10.1, 47.1), (200, 2))]
    centres[5] = None
    vectors = random_vectors(200)
    write_table(tmp_path / "a.parquet", vectors, centres, groups=3)
    query, apart = random_vectors(1, seed=1)[0], 3000.0
    order = np.argsort(-cosines(vectors, query), kind="stable")
    expected: list[int] = []
    for row in order:
        if row == 5:  # a chip without a place is no hit
            continue
        others = np.array([centres[i] for i in expected]).reshape(-1, 2)
        if (distances(np.array([centres[row]]), others) >= apart).all():
            expected.append(int(row))
    tables = Stored.open(tmp_path)
    for k in (1, 4, 100):
        found = best_rows(tables, query, k, apart=apart)
        assert [row for row, _ in found] == expected[:k]
    assert 4 < len(expected) < 20


# Queries


def test_a_chip_finds_itself_first(folder):
    hits = xsmae.search(folder, "b_64_0", k=4)
    assert hits[0].id == "b_64_0"
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert sorted((h.score for h in hits), reverse=True) == [h.score for h in hits]
    first = hits[0]
    assert first.centre == pytest.approx((11.02, 47.0))
    assert (first.row, first.col, first.height, first.width) == (64, 0, SIDE, SIDE)
    assert (first.source, first.time) == ("scenes/a.tif", TIME)
    assert first.ground == (5.0 * SIDE, 4.0 * SIDE)
    without = xsmae.search(folder, "b_64_0", k=3, exclude_query=True)
    assert [h.id for h in without] == [h.id for h in hits[1:]]


def test_several_queries_are_averaged_and_others_subtracted(folder):
    vectors = stored.unit(random_vectors(87))
    query = vectors[[0, 52]].mean(axis=0) - 0.5 * vectors[[3, 4]].mean(axis=0)
    near = cosines(vectors, query)
    order = np.argsort(-near)[:10]
    hits = xsmae.search(
        folder, ["a_0_0", (11.0201, 47.0003)], unlike=["a_96_0", "a_128_0"], k=10
    )
    assert [hit.number for hit in hits] == list(order)
    np.testing.assert_allclose([h.score for h in hits], near[order], atol=1e-6)


def test_queries_that_cancel_each_other(tmp_path):
    vector = random_vectors(1)[0]
    write_table(tmp_path / "a.parquet", [vector, -vector, 0 * vector], line_of(3))
    for query in (["a_0_0", "a_32_0"], "a_64_0"):
        with pytest.raises(UserError, match="cancel"):
            xsmae.search(tmp_path, query)


def test_a_place_finds_its_chip(folder, tmp_path):
    assert xsmae.search(folder, (12.1, 47.0), k=1)[0].id == "c_320_0"
    edge = (12.1 + 0.9 * HALF, 47 - 0.9 * HALF)
    assert xsmae.search(folder, edge, k=1)[0].id == "c_320_0"
    with pytest.raises(UserError, match=r"nearest is c_320_0.* 152 m") as found:
        xsmae.search(folder, (12.102, 47.0), k=1)
    assert "12.1" in str(found.value)
    # Of chips that overlap, that with the nearest centre.
    other = tmp_path / "other"
    shifted = [(10.0 + 0.0005 * i, 47.0) for i in range(9)]
    write_table(other / "a.parquet", random_vectors(9), shifted)
    write_table(other / "b.parquet", random_vectors(9, seed=1), shifted)
    assert xsmae.search(other, (10.00221, 47.0), k=1)[0].id == "a_128_0"
    # Across the antimeridian.
    write_table(tmp_path / "c" / "c.parquet", random_vectors(1), [(180.0, 0.0)])
    for x in (179.9995, -179.9995):
        assert xsmae.search(tmp_path / "c", (x, 0.0))[0].id == "c_0_0"
    with pytest.raises(UserError, match="c_0_0"):
        xsmae.search(tmp_path / "c", (179.0, 0.0))


def test_chips_without_a_place(tmp_path):
    write_table(tmp_path / "a.parquet", random_vectors(3), [None] * 3)
    hits = xsmae.search(tmp_path, "a_0_0")
    assert [hit.centre for hit in hits] == [None] * 3
    assert xsmae.search(tmp_path, "a_0_0", min_distance_m=1) == []
    assert xsmae.search(tmp_path, "a_0_0", bbox=(-180, -90, 180, 90)) == []
    with pytest.raises(UserError, match="no place"):
        xsmae.search(tmp_path, (0.0, 0.0))


# What is refused


@pytest.mark.parametrize(
    ("query", "options", "match"),
    [
        ([], {}, "nothing"),
        ("a_1_0", {}, "a_1_0.*a_0_0"),
        ((181.0, 0.0), {}, "181"),
        ((47.0, 99.0), {}, "longitude comes first"),
        ((47.0,), {}, "47"),
        (3, {}, "3"),
        ("a_0_0", {"k": 0}, "k=0"),
        ("a_0_0", {"k": 1001}, "1001"),
        ("a_0_0", {"min_distance_m": -1}, "-1"),
        ("a_0_0", {"min_distance_m": np.nan}, "nan"),
        ("a_0_0", {"bbox": (0, 10, 1, 9)}, "bbox=0,10,1,9"),
        ("a_0_0", {"bbox": (0, 10, 1)}, "bbox=0,10,1"),
        ("a_0_0", {"bbox": (0, 10, 200, 11)}, "bbox"),
        ("a_0_0", {"gsd": 1.0}, "gsd"),
        ("a_0_0", {"encoder": "runs/mine"}, "encoder"),
    ],
)
def test_a_search_that_cannot_work(folder, query, options, match):
    with pytest.raises(UserError, match=match):
        xsmae.search(folder, query, **options)


def test_tables_that_cannot_be_searched(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        Stored.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no table"):
        Stored.open(tmp_path / "empty")
    vectors = random_vectors(2)
    for change, match in (
        ({"digest": "b" * 16}, "b{16}.*a{16}"),
        ({"pooling": "cls"}, "cls.*mean"),
        ({"size": [64, 64]}, "64.*32"),
    ):
        write_table(folder / "z.parquet", vectors, line_of(2), **change)
        with pytest.raises(UserError, match=match) as found:
            Stored.open(folder)
        assert "z.parquet" in str(found.value)
    write_table(folder / "z.parquet", vectors[:, :5], line_of(2))
    with pytest.raises(UserError, match="width 5"):
        Stored.open(folder)
    write_table(folder / "z.parquet", vectors, line_of(2))
    content = (folder / "z.parquet").read_bytes()
    for damaged in (content[:-9], b"", content[:4] + b"\xff" * 400 + content[404:]):
        (folder / "z.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"z\.parquet"):
            xsmae.search(folder, "a_0_0")


def test_other_parquet_files_are_named(folder):
    import pyarrow as pa
    from pyarrow import parquet

    other = pa.table({"id": ["x"], "embedding": [[1.0, 2.0]]})
    for metadata in ({}, {"emb": "{"}, {"emb": json.dumps({"model": 3})}):
        parquet.write_table(
            other.replace_schema_metadata(metadata), folder / "features.parquet"
        )
        with pytest.raises(UserError, match=r"features\.parquet"):
            Stored.open(folder)
