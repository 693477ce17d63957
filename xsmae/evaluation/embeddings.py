"""Writes the features of every image of a source to one Parquet file."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import xsmae
from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.features import EvalBatch, encode_batches, load_image
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.process.files import atomic_write

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
ROWS = 8192  # per row group, which is held in memory
EVERY = 5.0  # seconds between progress lines


@dataclasses.dataclass(frozen=True)
class Embedded:
    """How many images the file has, and why others are missing: id -> reason."""

    images: int
    unusable: dict[str, str]


def write_embeddings(
    encoder: FrozenEncoder,
    source: Source,
    out: str | os.PathLike,
    *,
    size: int | None = None,
    pooling: str | None = None,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    should_stop: Callable[[], bool] = lambda: False,
) -> Embedded:
    """Embed the images of a source; `out` is written atomically.

    One row per image, in source order: id; label, the class name or null; gsd, the
    metres per pixel that the encoder got; embedding, float32 of fixed length. The
    schema's metadata has a JSON object under `xsmae`: the encoder's name and digest,
    pooling, bands, image size, versions and the source. The file's metadata has another
    one under `xsmae.unusable`: the ids of the images left out, and why.

    size: pixels. The largest central square of each image is resized to it; by default
    the size of training. pooling: `cls` or `mean`; by default the encoder's own.

    Raises:
      UserError: the encoder has no weights, the size or pooling is wrong, no image can
        be used, a feature is not finite, or the file cannot be written.
      KeyboardInterrupt: between batches once `should_stop()` is true.
    """
    size, pooling = _check(encoder, size, pooling, batch_size)
    out = Path(out)
    used = np.zeros(len(source), bool)
    batches = encode_batches(
        encoder.encode,
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
        with atomic_write(out) as temporary:
            told = {
                "schema": SCHEMA,
                "version": xsmae.__version__,
                "encoder": encoder.name,
                "digest": encoder.digest,
                "pooling": pooling,
                "bands": list(encoder.info["bands"]),
                "image_size": size,
                "gsd_units": "metres per pixel",
                "source": repr(source),
                "fingerprint": source.fingerprint,
            }
            with _Writer(temporary, source, told) as writer:
                for batch, encoded in _progress(batches, len(source), say):
                    features = np.asarray(encoded[pooling], np.float32)
                    if not np.isfinite(features).all():
                        raise UserError(
                            f"{encoder.name} gives features that are not finite in the "
                            f"batch that begins with {source.id(int(batch.index[0]))!r}"
                            ": give another checkpoint"
                        )
                    used[batch.index] = True
                    writer.add(batch, features)
                if not used.any():
                    raise UserError(f"none of the images of {source!r} can be used")
                unusable = _reasons(source, np.flatnonzero(~used), size)
                writer.unusable = unusable
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; give another --out"
        ) from None
    return Embedded(int(used.sum()), unusable)


def _check(
    encoder: FrozenEncoder, size: int | None, pooling: str | None, batch_size: int
) -> tuple[int, str]:
    """The size and the pooling to use; raises UserError if something does not fit."""
    if encoder.info is None:
        raise UserError(
            f"encoder={encoder.kind} is not a network: give an exported encoder, a "
            "workdir, RUN/checkpoints/STEP or random:SIZE"
        )
    size = encoder.info["image_size"] if size is None else size
    if size < 1 or size % encoder.patch_size:
        raise UserError(
            f"size={size}, expected a multiple of the patch size {encoder.patch_size}"
        )
    pooling = pooling or encoder.info["pooling"]
    if pooling not in encoder.features:
        raise UserError(
            f"pooling={pooling}, expected one of {', '.join(encoder.features)}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}, expected 1 or more")
    return size, pooling


class _Writer:
    """Writes rows to a Parquet file, one row group at a time.

    told: the schema's metadata. unusable: the images left out and why, for the file's
    metadata, which is written last.
    """

    def __init__(self, path: Path, source: Source, told: dict[str, Any]):
        self.path, self.source, self.told = path, source, told
        self.unusable: dict[str, str] = {}
        self._rows, self._waiting, self._file = [], 0, None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._write()
            text = json.dumps(self.unusable)
            self._file.add_key_value_metadata({"xsmae.unusable": text})
        if self._file is not None:
            self._file.close()

    def add(self, batch: EvalBatch, features: np.ndarray) -> None:
        """Add the rows of a batch."""
        self._rows.append((batch.index, batch.labels, batch.gsd[:, 0], features))
        self._waiting += len(features)
        if self._waiting >= ROWS:
            self._write()

    def _write(self) -> None:
        import pyarrow.parquet

        if not self._rows:
            return
        index, labels, gsd, features = map(
            np.concatenate, zip(*self._rows, strict=True)
        )
        table = _table(self.source, index, labels, gsd, features)
        table = table.replace_schema_metadata({"xsmae": json.dumps(self.told)})
        if self._file is None:
            self._file = pyarrow.parquet.ParquetWriter(self.path, table.schema)
        self._file.write_table(table)
        self._rows, self._waiting = [], 0


def _table(source: Source, index, labels, gsd, features) -> pyarrow.Table:
    import pyarrow as pa

    names = source.class_names
    width = features.shape[1]
    values = pa.array(np.ascontiguousarray(features).reshape(-1))
    return pa.table(
        {
            "id": pa.array([source.id(int(i)) for i in index], pa.string()),
            "label": pa.array(
                [names[label] if label >= 0 else None for label in labels], pa.string()
            ),
            "gsd": pa.array(gsd, pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, width),
        }
    )


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
