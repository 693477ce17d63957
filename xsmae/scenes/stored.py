"""The tables of a folder of embeddings, read chunk by chunk."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.errors import UserError, printable
from xsmae.scenes.chip_table import DTYPES
from xsmae.scenes.places import COLUMNS, Places

if TYPE_CHECKING:
    import pyarrow
    from jaxtyping import Bool, Int, Shaped

CHUNK = 2**25  # bytes of the vectors of a chunk as float32
BATCH = 8192  # rows that are decoded at a time
NEEDED = (
    "id", "embedding", "geometry", "bbox", "source", "datetime", "crs", "row", "col",
    "height", "width", "gsd_x", "gsd_y",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Vectors as they are stored, and the numbers of their rows.

    Each chunk of a folder has the same shape; the rows of the rest are -1.
    """

    numbers: Shaped[np.ndarray, "chunk width"]
    rows: Int[np.ndarray, " chunk"]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The tables of `xsmae embed` in a folder, which have vectors of one encoder.

    Rows are numbered through all tables, which are in the order of their names. embs:
    the content of each one's key `emb`. starts: the number of each one's first row, and
    that of all rows.
    """

    folder: Path
    paths: tuple[Path, ...]
    embs: tuple[dict[str, Any], ...]
    starts: tuple[int, ...]

    @classmethod
    def open(cls, folder: str | Path, paths: Sequence[Path] | None = None) -> Stored:
        """The tables of a folder: all of them, or some `paths`.

        Raises UserError if there are none, if a file is no table of embeddings, or if
        the vectors of two tables cannot be compared.
        """
        folder = Path(folder)
        paths = tuple(sorted(folder.glob("[!.]*.parquet")) if paths is None else paths)
        if not paths:
            why = "has no table" if folder.is_dir() else "is no folder"
            raise UserError(
                f"{printable(str(folder))} {why}, expected the folder that xsmae embed "
                "SCENES --out=FOLDER wrote"
            )
        found = [_read_footer(path) for path in paths]
        embs, counts = zip(*found, strict=True)
        for path, emb in zip(paths, embs, strict=True):
            check_same(paths[0], embs[0], path, emb)
        starts = (0, *itertools.accumulate(counts))
        return cls(folder, paths, embs, starts)

    @property
    def count(self) -> int:
        """All rows."""
        return self.starts[-1]

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.embs[0]["emb:dimensions"]

    @property
    def digest(self) -> str:
        """Of the encoder."""
        return self.embs[0]["model"]["digest"]

    @property
    def pooling(self) -> str:
        """Of the patches' vectors."""
        return self.embs[0]["emb:runtime_parameters"]["pooling"]

    @property
    def side(self) -> int:
        """Pixels of a chip along an axis, as the encoder got it."""
        return self.embs[0]["emb:runtime_parameters"]["size"][0]

    @property
    def chip_sizes(self) -> set[tuple[int, int]]:
        """Height and width of chips in pixels of their scenes."""
        return {tuple(emb["emb:chip_layout"]["chip_size"]) for emb in self.embs}

    @property
    def filled(self) -> bool:
        """True if the encoder got the mean instead of a band that a scene lacks."""
        return any(e["emb:runtime_parameters"]["filled_with_mean"] for e in self.embs)

    def batches(
        self, columns: Sequence[str]
    ) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """All rows in order: the number of the first one, and some columns."""
        for path, start in zip(self.paths, self.starts, strict=False):
            with _reading(path) as file:
                for batch in file.iter_batches(BATCH, columns=list(columns)):
                    yield start, batch
                    start += len(batch)

    def chunks(
        self, wanted: Callable[[int, Places], Bool[np.ndarray, " n"]] | None = None
    ) -> Iterator[Chunk]:
        """All vectors, or those that are wanted, in order.

        wanted: gets the number of the first row, and places of the following. Row
        groups without a wanted row are not decoded.
        """
        size = max(CHUNK // (4 * self.width), 1)
        numbers, rows, filled = None, None, 0
        for at, part in self._vectors(wanted):
            while len(part):
                if numbers is not None and numbers.dtype != part.dtype:
                    yield Chunk(numbers, rows)  # tables of two dtypes
                    numbers = None
                if numbers is None:
                    numbers = np.zeros((size, self.width), part.dtype)
                    rows, filled = np.full(size, -1, np.int32), 0
                many = min(len(part), size - filled)
                numbers[filled : filled + many] = part[:many]
                rows[filled : filled + many] = at[:many]
                filled, at, part = filled + many, at[many:], part[many:]
                if filled == size:
                    yield Chunk(numbers, rows)
                    numbers = None
        if numbers is not None:
            yield Chunk(numbers, rows)

    def _vectors(self, wanted) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The numbers of rows, and their vectors."""
        for path, start in zip(self.paths, self.starts, strict=False):
            with _reading(path) as file:
                for group in range(file.num_row_groups):
                    many = file.metadata.row_group(group).num_rows
                    keep = None
                    if wanted is not None:
                        table = file.read_row_group(group, columns=list(COLUMNS))
                        keep = wanted(start, Places.of(table))
                    if keep is None or keep.any():
                        yield from self._of_group(file, group, start, keep)
                    start += many

    def _of_group(self, file, group, start, keep):
        done = 0
        for batch in file.iter_batches(BATCH, [group], columns=["embedding"]):
            part = vectors_of(batch, self.width)
            at = np.arange(start + done, start + done + len(part), dtype=np.int32)
            if keep is not None:
                chosen = keep[done : done + len(part)]
                at, part = at[chosen], part[chosen]
            done += len(batch)
            yield at, part

    def rows(self, numbers: Sequence[int], columns: Sequence[str]) -> pyarrow.Table:
        """Some columns of rows, in the order of `numbers`."""
        import pyarrow as pa

        order = np.argsort(numbers, kind="stable")
        left = np.asarray(numbers, int)[order]
        parts = []
        for path, start, stop in zip(
            self.paths, self.starts, self.starts[1:], strict=False
        ):
            inside = left[(left >= start) & (left < stop)] - start
            if not len(inside):
                continue
            with _reading(path) as file:
                parts += list(_taken(file, inside, list(columns)))
        table = pa.concat_tables(parts)
        return table.take(np.argsort(order, kind="stable"))

    def vectors(self, numbers: Sequence[int]) -> np.ndarray:
        """The vectors of rows, of unit length; zeros stay zeros."""
        # The scale of a row of int8 has no effect on its direction.
        found = [vectors_of(self.rows([n], ["embedding"]), self.width) for n in numbers]
        return unit(np.concatenate(found).astype(np.float32))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of unit length; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def vectors_of(batch: pyarrow.RecordBatch | pyarrow.Table, width: int) -> np.ndarray:
    """The column of embeddings as an array, in the stored dtype."""
    column = batch.column("embedding")
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _taken(file, inside: np.ndarray, columns: list[str]) -> Iterator[pyarrow.Table]:
    """The rows of a table, whose numbers ascend."""
    import pyarrow as pa

    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if not ((inside >= start) & (inside < stop)).any():
            start = stop
            continue
        for batch in file.iter_batches(BATCH, [group], columns=columns):
            here = inside[(inside >= start) & (inside < start + len(batch))] - start
            if len(here):
                yield pa.Table.from_batches([batch]).take(here)
            start += len(batch)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{printable(str(path))} cannot be read ({printable(reason)[:200]}): embed "
            "its scene again"
        ) from None


def _read_footer(path: Path) -> tuple[dict[str, Any], int]:
    """The content of a table's key `emb`, and how many rows it has."""
    with _reading(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        told = (file.metadata.metadata or {}).get(b"emb")
    try:
        emb = json.loads(told)
        parameters = emb["emb:runtime_parameters"]
        found = (
            emb["model"]["digest"], parameters["pooling"], parameters["size"][0],
            parameters["filled_with_mean"], emb["emb:chip_layout"]["chip_size"][1],
        )  # fmt: skip
        kind = schema.field("embedding").type
        good = kind.list_size == emb["emb:dimensions"] and None not in found
        good = good and kind.value_type.to_pandas_dtype().__name__ in DTYPES
        good = good and set(NEEDED) <= set(schema.names)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        good = False
    if not good:
        raise UserError(
            f"{printable(str(path))} is no table of xsmae embed SCENES: move it away"
        )
    return emb, count


def check_same(first: Path, one: dict, path: Path, other: dict) -> None:
    """Raise UserError if the vectors of two tables cannot be compared."""
    for what, get in (
        ("the encoder", lambda e: e["model"]["digest"]),
        ("vectors of width", lambda e: e["emb:dimensions"]),
        ("the pooling", lambda e: e["emb:runtime_parameters"]["pooling"]),
        ("chips resized to", lambda e: e["emb:runtime_parameters"]["size"]),
    ):
        if get(one) != get(other):
            raise UserError(
                f"{printable(path.name)} has {what} {get(other)}, "
                f"{printable(first.name)} has {get(one)}: vectors of both cannot be "
                "compared; embed all scenes with one encoder and one size, or move one "
                "table away"
            )
