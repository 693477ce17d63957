"""Labels every image of a source by a trained classifier, in a CSV or Parquet file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import xsmae
from xsmae.data.records import Source
from xsmae.errors import UserError, printable
from xsmae.evaluation.image_tables import Written, write_image_table
from xsmae.evaluation.reading import Kind, read_by
from xsmae.weights.classifier import Classifier, probabilities

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
SUFFIXES = (".csv", ".parquet")


def write_labels(
    classifier: Classifier,
    source: Source,
    out: str | os.PathLike,
    *,
    missing_bands: str = "refuse",
    batch_size: int = 64,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    should_stop: Callable[[], bool] = lambda: False,
) -> Written:
    """Label the images of a source; `out`, CSV or Parquet, is written atomically.

    One row per image, in source order: id; label, the class with the highest score;
    probability, of that class; p_CLASS, of every class; and true_label, the class name
    or null, if the source has labels. The largest central square of each image is
    resized to the classifier's size, as in its evaluation. The schema's metadata of a
    Parquet file has a JSON object under `xsmae`: the classifier's digest, classes and
    image size, versions and the source.

    missing_bands: one of `MISSING_BANDS`.

    Raises:
      UserError: the classifier cannot read the images, none can be used, the name of
        the file ends otherwise, or it cannot be written.
      KeyboardInterrupt: between batches once `should_stop()` is true.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(
            f"out={out}, expected a name that ends in {' or '.join(SUFFIXES)}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}, expected 1 or more")
    encoder = classifier.encoder
    reading = read_by(
        "the head", encoder.bands, Kind.of(source), missing_bands=missing_bands
    )
    told = {
        "schema": SCHEMA,
        "version": xsmae.__version__,
        "head": classifier.digest,
        "kind": classifier.info["kind"],
        "classes": list(map(printable, classifier.classes)),
        "encoder": encoder.digest,
        "bands": list(encoder.bands.names),
        "image_size": classifier.size,
        "source": printable(repr(source)),
        "fingerprint": source.fingerprint,
    }
    return write_image_table(
        out,
        source,
        lambda images, gsd: {"scores": classifier.scores(reading(images), gsd)},
        name="scores",
        table=lambda *columns: _table(classifier.classes, *columns),
        told=told,
        title="the head",
        size=classifier.size,
        batch_size=batch_size,
        csv=out.suffix == ".csv",
        say=say,
        should_stop=should_stop,
    )


def _table(classes, source: Source, index, labels, gsd, scores) -> pyarrow.Table:
    import pyarrow as pa

    names, true = list(map(printable, classes)), source.class_names
    shares, chosen = probabilities(scores), scores.argmax(axis=1)
    columns = {
        "id": [printable(source.id(int(i))) for i in index],
        "label": [names[label] for label in chosen],
        "probability": shares[np.arange(len(shares)), chosen],
        **{f"p_{name}": shares[:, place] for place, name in enumerate(names)},
    }
    found = {
        name: pa.array(values, pa.string() if isinstance(values, list) else None)
        for name, values in columns.items()
    }
    if true:
        known = [printable(true[label]) if label >= 0 else None for label in labels]
        found["true_label"] = pa.array(known, pa.string())
    return pa.table(found)
