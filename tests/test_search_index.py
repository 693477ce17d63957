"""The approximate index of a search: its hits, its recall, when it is built again."""

import builtins
import json
import shutil

import numpy as np
import pytest

import xsmae
from tests.support.chip_tables import write_table
from tests.test_search import line_of, random_vectors
from xsmae.errors import UserError
from xsmae.scenes import search
from xsmae.scenes.approximate import ABOUT, INDEX, open_index
from xsmae.scenes.stored import Stored


@pytest.fixture
def folder(tmp_path):
    vectors = random_vectors(300)
    vectors[7] = 0
    path = tmp_path / "embeddings"
    write_table(path / "a.parquet", vectors[:200], line_of(200), groups=2)
    write_table(path / "b.parquet", vectors[200:], line_of(100, 20.0), dtype="int8")
    return path


def built(folder):
    """How often the index of a folder is built by two searches."""
    lines = []
    for _ in range(2):
        xsmae.search(folder, "a_0_0", index="usearch", say=lines.append)
    return sum(line.startswith("builds") for line in lines)


def test_the_hits_of_an_index(folder, monkeypatch):
    pytest.importorskip("usearch")
    lines = []
    for options in (
        {},
        {"exclude_query": True},
        {"bbox": (20.1, 46, 20.5, 48)},
        {"min_distance_m": 2000.0},
        {"unlike": "b_0_0", "bbox": (10, 40, 11, 50), "min_distance_m": 1.0},
    ):
        exact = xsmae.search(folder, "a_320_0", k=8, **options)
        found = xsmae.search(
            folder, "a_320_0", k=8, index="usearch", say=lines.append, **options
        )
        assert [h.id for h in found] == [h.id for h in exact], options
        for one, other in zip(found, exact, strict=True):
            assert one.score == pytest.approx(other.score, abs=2e-3)
    assert sum(line.startswith("builds") for line in lines) == 1
    told = json.loads((folder / ABOUT).read_text())
    assert told["vectors"] == 299
    assert 0.95 < told["recall"] <= 1
    assert f"{told['recall']:.1%}" in lines[1]
    # With too few candidates, the search is exact.
    monkeypatch.setattr(search, "LIMIT", 1)
    monkeypatch.setattr(search, "SPARE", 1)
    monkeypatch.setattr(search, "MORE", 1)
    place = {"bbox": (20.1, 46, 20.5, 48), "k": 3}
    found = xsmae.search(folder, "a_0_0", index="usearch", say=lines.append, **place)
    assert "searches exactly" in lines[-1]
    assert [h.id for h in found] == [
        h.id for h in xsmae.search(folder, "a_0_0", **place)
    ]


def test_the_recall_is_measured(folder, monkeypatch):
    pytest.importorskip("usearch")
    exact = "xsmae.scenes.approximate.nearest"
    monkeypatch.setattr(
        exact, lambda chunks, queries, many: (None, np.full((len(queries), many), 7))
    )
    assert open_index(Stored.open(folder), lambda line: None).recall == 0


def test_an_index_is_built_again_when_the_tables_change(folder, tmp_path):
    pytest.importorskip("usearch")
    assert [built(folder) for _ in range(2)] == [1, 0]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy)  # with other times
    assert built(copy) == 0
    write_table(folder / "c.parquet", random_vectors(3, seed=9), line_of(3, 30.0))
    assert built(folder) == 1
    assert xsmae.search(folder, "c_0_0", index="usearch")[0].id == "c_0_0"
    (folder / "c.parquet").unlink()
    assert built(folder) == 1
    for damage in (b"", b"x" * 1000, None):
        if damage is None:
            (folder / INDEX).unlink()
        else:
            (folder / INDEX).write_bytes(damage)
        assert built(folder) == 1
    for text in ("{", "[]", '{"tables": [3]}'):
        (folder / ABOUT).write_text(text)
        assert built(folder) == 1


def test_without_the_package_a_line_says_what_to_install(folder, monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("usearch"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"xsmae\[search\]"):
        xsmae.search(folder, "a_0_0", index="usearch")
    with pytest.raises(UserError, match="faiss"):
        xsmae.search(folder, "a_0_0", index="faiss")
