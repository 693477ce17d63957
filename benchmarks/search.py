"""Time, memory and exactness of `xsmae search`, beside NumPy.

    python -m benchmarks.search [--rows=200000] [--width=384] [--embeddings=DIR]

Writes tables of random vectors of unit length (two of each dtype) into a temporary
folder, and searches them for chips, one query at a time and all at once. NumPy computes
the same from an array that is in memory. The first search, which compiles, does not
count. The vectors of the queries are those of chips with some noise.

- `s/query`: the median and the range; `cpu s`: the median of processor time, of all
  threads together.
- `equal`: the part of the queries whose ten hits are NumPy's, in order. `recall`: the
  part of float32's ten hits that are among those of the stored dtype.
- `peak MB`: the growth of the resident memory during the search.

--embeddings: also the recall of int8 on the vectors of these tables, in float32.

Prints one JSON line per row, then a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from xsmae.scenes.chip_files import convert
from xsmae.scenes.chip_table import DTYPES, Chips, ChipTable, SceneFacts
from xsmae.scenes.exact import nearest
from xsmae.scenes.quantize import quantize, recall
from xsmae.scenes.search import best_rows
from xsmae.scenes.stored import Stored, unit, vectors_of

HITS, TABLES, PART = 10, 2, 20_000
NOISE = 0.5  # length of what is added to a chip's vector


def vectors_of_part(number: int, count: int, width: int) -> np.ndarray:
    """Random vectors of unit length; the same for the same number."""
    rng = np.random.default_rng(number)
    return unit(rng.normal(size=(count, width)).astype(np.float32))


def parts(rows: int) -> list[tuple[int, int]]:
    """Numbers and sizes of the parts that are computed at a time."""
    return [(i, min(PART, rows - i * PART)) for i in range(-(-rows // PART))]


def write_tables(folder: Path, rows: int, width: int, dtype: str) -> Stored:
    """The tables of all vectors."""
    emb = {
        "emb:dimensions": width,
        "emb:chip_layout": {"chip_size": [224, 224]},
        "emb:runtime_parameters": {
            "size": [224, 224], "pooling": "mean", "filled_with_mean": [],
        },
        "model": {"digest": "0" * 16},
    }  # fmt: skip
    folder.mkdir()
    for table, some in enumerate(np.array_split(parts(rows), TABLES)):
        facts = SceneFacts(f"s{table}", f"s{table}.tif", None, None, (224, 224))
        with ChipTable(folder / f"s{table}.parquet", facts, emb) as file:
            for number, count in some.tolist():
                stored, scale = convert(vectors_of_part(number, count, width), dtype)
                row = (number * PART + np.arange(count)) * 224
                file.add(
                    Chips(
                        embedding=stored,
                        scale=scale,
                        outlines=[None] * count,
                        place=np.column_stack([row, np.zeros_like(row)]),
                        gsd=np.ones((count, 2)),
                        valid_fraction=np.ones(count),
                    )
                )
    return Stored.open(folder)


def queries_of(rows: int, width: int, many: int) -> np.ndarray:
    """Vectors of chips with noise."""
    number, count = parts(rows)[0]
    chips = vectors_of_part(number, count, width)[:: max(count // many, 1)][:many]
    noise = unit(np.random.default_rng(1_000_000).normal(size=chips.shape))
    return unit(chips + NOISE * noise).astype(np.float32)


@contextlib.contextmanager
def memory() -> Iterator[list[float]]:
    """The growth of the resident memory in MB, in a list that is filled at the end."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    found, done, peaks = [], threading.Event(), [resident()]
    before = peaks[0]

    def watch():
        while not done.wait(0.01):
            peaks.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(max(peaks) - before)


def timed(call, items) -> tuple[list, np.ndarray]:
    """Results of a call for each item; seconds and processor time of each."""
    results, seconds = [], []
    for item in items:
        begin = time.perf_counter(), time.process_time()
        results.append(call(item))
        end = time.perf_counter(), time.process_time()
        seconds.append(np.subtract(end, begin))
    return results, np.array(seconds)


def row_of(name, hits, exact, seconds, together, peak, many):
    """A row of the table."""
    same = [list(a) == list(b) for a, b in zip(hits, exact, strict=True)]
    kept = [len({*a} & {*b}) / HITS for a, b in zip(hits, exact, strict=True)]
    return {
        "search": name,
        "s/query": float(np.median(seconds[:, 0])),
        "from": seconds[:, 0].min(),
        "to": seconds[:, 0].max(),
        "cpu s": float(np.median(seconds[:, 1])),
        "s/query, all at once": together / many,
        "equal": float(np.mean(same)),
        "recall": float(np.mean(kept)),
        "peak MB": peak,
    }


def measure(folder: Path, rows: int, width: int, many: int) -> Iterator[dict]:
    """A row for each dtype, and one of NumPy."""
    queries = queries_of(rows, width, many)
    found = {}
    for dtype in DTYPES:
        tables = write_tables(folder / dtype, rows, width, dtype)
        print(json.dumps({"written": dtype}), flush=True)
        best_rows(tables, queries[0], HITS)  # compiles
        nearest(tables.chunks(), queries, HITS)
        with memory() as peak:
            results, seconds = timed(lambda q: best_rows(tables, q, HITS), queries)  # noqa: B023
        begin = time.perf_counter()
        nearest(tables.chunks(), queries, HITS)
        together = time.perf_counter() - begin
        hits = [[row for row, _ in result] for result in results]
        found[dtype] = hits, seconds, together, peak[0]
    with memory() as peak:
        whole = np.concatenate([vectors_of_part(*p, width) for p in parts(rows)])

    def by_numpy(query):
        near = whole @ query
        best = np.argpartition(-near, HITS)[:HITS]
        return best[np.argsort(-near[best], kind="stable")].tolist()

    exact, seconds = timed(by_numpy, queries)
    begin = time.perf_counter()
    near = whole @ queries.T
    np.argpartition(-near, HITS, axis=0)
    together = time.perf_counter() - begin
    yield row_of("NumPy, in memory", exact, exact, seconds, together, peak[0], many)
    for dtype, (hits, *numbers) in found.items():
        yield row_of(f"{dtype} tables", hits, exact, *numbers, many)


def recall_of(folder: str) -> dict:
    """The recall of int8 on the vectors of tables in float32."""
    tables = Stored.open(folder)
    found = [vectors_of(b, tables.width) for _, b in tables.batches(["embedding"])]
    vectors = np.concatenate(found).astype(np.float32)
    numbers, scale = quantize(vectors)
    return {
        "chips": len(vectors),
        "width": tables.width,
        "recall of int8": recall(vectors, numbers * scale[:, None]),
    }


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else "unknown"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--embeddings")
    options = parser.parse_args()
    print(json.dumps({"processor": processor(), "devices": str(jax.devices())}))
    if options.embeddings:
        print(json.dumps(recall_of(options.embeddings)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = options.rows, options.width, options.queries
        for row in measure(Path(folder), *size):
            rows.append(row)
            print(json.dumps(row), flush=True)
    names = list(rows[0])
    print("\n| " + " | ".join(names) + " |\n|---" + "|---:" * (len(names) - 1) + "|")
    for row in rows:
        cells = [x if isinstance(x, str) else f"{x:.3g}" for x in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
