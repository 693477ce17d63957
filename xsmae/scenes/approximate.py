"""Approximate search with usearch, for tens of millions of chips.

The index is kept beside the tables with their digests, and built again when they
change. Its vectors are float16, so scores are right to about 0.001.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.errors import UserError, printable
from xsmae.process.files import atomic_write, write_json
from xsmae.scenes.exact import nearest
from xsmae.scenes.manifest import digest_of
from xsmae.scenes.stored import Stored, unit

if TYPE_CHECKING:
    from jaxtyping import Float, Int

INDEX, ABOUT = "index.usearch", "index.json"
SCHEMA = 1
SAMPLE, NEIGHBOURS = 100, 10  # queries of the measured recall, and hits of each


class Index:
    """The index of the tables of a folder. recall: measured when it was built."""

    def __init__(self, index: Any, recall: float):
        self._index, self.recall = index, recall

    def nearest(
        self, query: Float[np.ndarray, " width"], many: int
    ) -> tuple[Float[np.ndarray, " many"], Int[np.ndarray, " many"]]:
        """Cosines and rows, best first."""
        found = self._index.search(unit(np.asarray(query, np.float32)), many)
        return 1 - np.asarray(found.distances), np.asarray(found.keys, np.int64)


def open_index(stored: Stored, say: Callable[[str], None]) -> Index:
    """The index that is kept, or a new one.

    Raises UserError without the package, or if the index cannot be written.
    """
    try:
        from usearch.index import Index as Graph
    except ImportError:
        raise UserError(
            "index=usearch needs the package usearch: pip install 'xsmae[search]'"
        ) from None
    folder = stored.folder
    told = _read(folder / ABOUT)
    before = told.get("tables", [])
    tables = _tables(stored, before)
    if _digests(tables) == _digests(before) and told.get("schema") == SCHEMA:
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            graph = Graph.restore(folder / INDEX, view=True)
            if graph is not None and len(graph) == told["vectors"]:
                if tables != before:  # copies of the same files
                    write_json(folder / ABOUT, {**told, "tables": tables})
                return Index(graph, told["recall"])
    say(f"builds the index of {stored.count} chips")
    graph = Graph(ndim=stored.width, metric="cos", dtype="f16")
    for chunk in stored.chunks():
        vectors = unit(chunk.numbers.astype(np.float32))
        # A vector of zeros has no direction.
        kept = (chunk.rows >= 0) & vectors.any(axis=1)
        if kept.any():
            graph.add(chunk.rows[kept].astype(np.uint64), vectors[kept])
    if not len(graph):
        raise UserError(f"{printable(str(folder))} has only vectors of zeros")
    index = Index(graph, 0.0)
    index.recall = _recall(stored, index)
    try:
        with atomic_write(folder / INDEX) as temporary:
            graph.save(str(temporary))
        about = {
            "schema": SCHEMA,
            "tables": tables,
            "vectors": len(graph),
            "recall": index.recall,
        }
        write_json(folder / ABOUT, about)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write to {printable(str(folder))}: {error}; search without the "
            "index"
        ) from None
    return index


def _read(path: Path) -> dict[str, Any]:
    """What is known of the index that is kept; {} without one."""
    try:
        told = json.loads(path.read_text())
        _digests(told["tables"])
        return told if {"vectors", "recall"} <= told.keys() else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _digests(tables: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["name"], entry["sha256"]) for entry in tables]


def _tables(stored: Stored, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, time, size and digest of each table; a file is not read again in vain."""
    known = {entry["name"]: entry for entry in before}
    found = []
    for path in stored.paths:
        state, old = path.stat(), known.get(path.name, {})
        stamp = {"time": state.st_mtime_ns, "bytes": state.st_size}
        same = all(old.get(key) == value for key, value in stamp.items())
        digest = old["sha256"] if same else digest_of(path)["sha256"]
        found.append({"name": path.name, **stamp, "sha256": digest})
    return found


def _recall(stored: Stored, index: Index) -> float:
    """The part of the exact ten nearest of some chips that the index finds, 0 to 1."""
    count = min(SAMPLE, stored.count)
    queries = stored.vectors(np.arange(count) * stored.count // count)
    queries = queries[queries.any(axis=1)]
    many = min(NEIGHBOURS, stored.count)
    _, exact = nearest(stored.chunks(), queries, many)
    same = [
        len(np.intersect1d(rows, index.nearest(query, many)[1]))
        for query, rows in zip(queries, exact, strict=True)
    ]
    return round(float(np.mean(same)) / many, 4) if same else 1.0
