"""Writes the features of every image of a source to one Parquet file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import xsmae
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.evaluation.image_tables import Written, write_image_table
from xsmae.evaluation.subjects import FrozenEncoder

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1


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
) -> Written:
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
    return write_image_table(
        Path(out),
        source,
        lambda images, gsd: {"features": encoder.encode(images, gsd)[pooling]},
        name="features",
        table=_table,
        told=told,
        title=encoder.name,
        size=size,
        batch_size=batch_size,
        say=say,
        should_stop=should_stop,
    )


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
