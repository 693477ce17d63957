"""Tables with one row per image of a source, as Parquet or CSV, written atomically."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.features import Encode, EvalBatch, encode_batches, load_image
from xsmae.process.files import atomic_write

if TYPE_CHECKING:
    import pyarrow

ROWS = 8192  # per row group, which is held in memory
EVERY = 5.0  # seconds between progress lines

# (source, positions [n], labels [n], gsd [n], values [n, width]) -> the rows.
MakeTable = Callable[[Source, np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Written:
    """How many images the file has, and why others are missing: id -> reason."""

    images: int
    unusable: dict[str, str]


def write_image_table(
    out: Path,
    source: Source,
    encode: Encode,
    *,
    name: str,
    table: MakeTable,
    told: Mapping[str, Any],
    title: str,
    size: int,
    batch_size: int,
    csv: bool = False,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Written:
    """Write what `encode` gives as `name` for the images of a source, in their order.

    table: makes rows of it. told: the metadata of a Parquet file, see
    `write_embeddings`. title: what `encode` is, in messages. size: pixels, to which the
    largest central square of each image is resized. csv: True writes CSV, which has no
    metadata.

    Raises:
      UserError: no image can be used, a value is not finite, or the file cannot be
        written.
      KeyboardInterrupt: between batches once `should_stop()` is true.
    """
    used = np.zeros(len(source), bool)
    batches = encode_batches(
        encode,
        source,
        np.arange(len(source)),
        size=size,
        batch_size=batch_size,
        should_stop=should_stop,
    )
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(out) as temporary,
            _Writer(temporary, source, table, told, csv) as writer,
        ):
            for batch, encoded in _progress(batches, len(source), say):
                values = np.asarray(encoded[name], np.float32)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{title} gives {name} that are not finite in the batch that "
                        f"begins with {source.id(int(batch.index[0]))!r}: give another "
                        "checkpoint"
                    )
                used[batch.index] = True
                writer.add(batch, values)
            if not used.any():
                raise UserError(f"none of the images of {source!r} can be used")
            unusable = _reasons(source, np.flatnonzero(~used), size)
            writer.unusable = unusable
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; give another --out"
        ) from None
    return Written(int(used.sum()), unusable)


class _Writer:
    """Writes rows to a file, one group at a time.

    told: the schema's metadata. unusable: the images left out and why, for the file's
    metadata, which is written last.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        table: MakeTable,
        told: Mapping[str, Any],
        csv: bool,
    ):
        self.path, self.source, self.table, self.told = path, source, table, told
        self.csv = csv
        self.unusable: dict[str, str] = {}
        self._rows, self._waiting, self._file = [], 0, None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._write()
            if not self.csv:
                text = json.dumps(self.unusable)
                self._file.add_key_value_metadata({"xsmae.unusable": text})
        if self._file is not None:
            self._file.close()

    def add(self, batch: EvalBatch, values: np.ndarray) -> None:
        """Add the rows of a batch."""
        self._rows.append((batch.index, batch.labels, batch.gsd[:, 0], values))
        self._waiting += len(values)
        if self._waiting >= ROWS:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        columns = map(np.concatenate, zip(*self._rows, strict=True))
        table = self.table(self.source, *columns)
        table = table.replace_schema_metadata({"xsmae": json.dumps(self.told)})
        if self._file is None:
            self._file = self._open(table.schema)
        self._file.write_table(table)
        self._rows, self._waiting = [], 0

    def _open(self, schema: pyarrow.Schema):
        if self.csv:
            import pyarrow.csv

            return pyarrow.csv.CSVWriter(self.path, schema)
        import pyarrow.parquet

        return pyarrow.parquet.ParquetWriter(self.path, schema)


def _progress(
    batches: Iterator[tuple[EvalBatch, dict[str, np.ndarray]]],
    total: int,
    say: Callable[[str], None],
) -> Iterator[tuple[EvalBatch, dict[str, np.ndarray]]]:
    """The batches, unchanged; prints a progress line every few seconds."""
    begin = last = time.monotonic()
    done = 0
    for batch, encoded in batches:
        yield batch, encoded
        done += len(batch.index)
        now = time.monotonic()
        if now - last > EVERY:
            last = now
            at = int(batch.index[-1]) + 1
            say(f"{at}/{total}, {done / (now - begin):.0f} images/s")
    rate = done / max(time.monotonic() - begin, 1e-9)
    say(f"{total}/{total}, {rate:.0f} images/s")


def _reasons(source: Source, positions: np.ndarray, size: int) -> dict[str, str]:
    """Reads images that cannot be used once more to learn why: id -> reason."""
    found = {}
    for index in map(int, positions):
        reason = "the first read failed, a second one did not"
        try:
            load_image(source, index, size)
        except BadImageError as error:
            reason = str(error)
        found[source.id(index)] = reason
    return found
