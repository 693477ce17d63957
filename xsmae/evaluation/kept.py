"""The folder beside a result row, which has the trained head."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xsmae.errors import UserError
from xsmae.evaluation.rows import Protocol, Result
from xsmae.evaluation.scales import Scale
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.weights.classifier import TrainedClassifier, save_classifier

HEAD = "head"  # the folder of the head in that of the row


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the folder and --out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; free space or give another "
            "--out"
        ) from None


def check_folder(folder: Path) -> None:
    """Raise UserError if no file can be written into `folder`; creates it."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def describe_training(
    encoder: FrozenEncoder, protocol: Protocol, scale: Scale, seed: int
) -> dict[str, Any]:
    """How a head was trained, for its `head.json`."""
    return {
        "task": protocol.task,
        "encoder": encoder.name,
        "digest": encoder.digest,
        "data": dict(protocol.data),
        "protocol": protocol.key,
        "options": dict(protocol.options),
        "scale": scale.percent,
        "seed": seed,
    }


def keep_classifier(
    folder: Path,
    trained: TrainedClassifier,
    row: Result,
    scale: Scale,
    training: Mapping[str, Any],
    beside: Path | None = None,
) -> None:
    """Write the trained classifier of a row into the folder of the row.

    beside: the folder of another row, with which it shares an equal encoder on disk.
    """
    with writing_to(folder):
        save_classifier(
            folder / HEAD,
            trained,
            classes=row.class_names,
            feature=row.feature,
            size=scale.size,
            scale=scale.percent,
            gsd_policy=row.protocol.gsd_policy,
            gsd_factor=scale.gsd_factor,
            training=training,
            beside=beside and beside / HEAD,
        )
