"""The workdir of a run: its config, its environment, and errors of its disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_collections

from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import EXECUTION_FIELDS, flatten
from xsmae.data.photometric import CHANGES
from xsmae.errors import BadImageError, UserError
from xsmae.process.environment import describe_environment
from xsmae.process.files import write_json
from xsmae.process.log import LOG

# Fields that may change on resuming: they do not change the batches, nor the numbers
# except for rounding. A name that ends with a dot is a whole group of fields. The kNN
# settings that decide the accuracy (k, temperature, images) must stay within one curve.
FREE_FIELDS = (
    *EXECUTION_FIELDS,
    "mesh",
    "input.num_workers",
    "input.num_threads",
    "input.prefetch",
    "input.max_rejected_fraction",
    "checkpoint.",
    "figures.",
    "knn.every",
    "knn.batch_size",
    "knn.full_at_end",
    "log_every",
    "optim.max_nonfinite",
    "profile",
    "watchdog_minutes",
    "wavelengths",
    "data.root",
    "data.csv_path",
    "data.gsd_csv",
    "data.data_dir",
    "tensorboard",
    "wandb",
)

# Fields that configs of older runs lack, with the value that does what those runs did.
ADDED_FIELDS = {
    **{f"views.{name}": 0.0 for name in CHANGES},
    "views.photometric_ramp": 0,
}

# Errors of a disk that accepts no more data, even if they name no file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields of `new` that differ from `old`, one text each; no free fields."""
    old, new = ADDED_FIELDS | flatten(old), ADDED_FIELDS | flatten(new)
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]


def _is_free(name: str) -> bool:
    """True if a field may differ on resuming."""
    groups = tuple(field for field in FREE_FIELDS if field.endswith("."))
    name = re.sub(r"^data\.parts\.[^.]+\.", "data.", name)  # of a mix
    return name in FREE_FIELDS or name.startswith(groups)


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Create the folder and its `config.json`, or check that the config is the same.

    A run without a checkpoint may start again with another config. Raises UserError if
    the folder cannot be written to, or if its run has another config.
    """
    resolved = json.loads(config.to_json())
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and has_checkpoint(workdir):
            saved = json.loads(path.read_text())
            if not isinstance(saved, dict):
                raise json.JSONDecodeError("not an object", str(saved), 0)
            found = differences(saved, resolved)
            if found:
                raise UserError(
                    f"{workdir} has a run with another config: {'; '.join(found)}. "
                    "Give the old config to resume it, or a new --workdir"
                )
        write_json(path, resolved)
        write_json(workdir / "environment.json", describe_environment())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not JSON ({error}): give a new --workdir, or remove the file "
            "to resume this run"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror}; give another "
            "--workdir"
        ) from None


def check_outside_data(
    path: Path, data: Mapping[str, Any], ids: Iterable[str] = (), *, flag: str
) -> None:
    """Raise UserError if figures written to `path` would become images of `data`.

    This can happen only if the data is a folder, because its files are listed at every
    start. Hidden folders are not listed. ids: the images; their folders may be links
    that lead elsewhere. flag: the flag that gave `path`.
    """
    if data["source"] == "mix":
        ids = list(ids)
        for name, part in (data.get("parts") or {}).items():
            own = (i.removeprefix(f"{name}/") for i in ids if i.startswith(f"{name}/"))
            check_outside_data(path, part, own, flag=flag)
    if data["source"] != "folder" or data.get("root") is None:
        return
    root, real = Path(data["root"]).expanduser(), Path(os.path.realpath(path))
    folders = {PurePosixPath(os.path.dirname(name)) for name in ids}
    for folder in {
        PurePosixPath("."),
        *folders,
        *(p for f in folders for p in f.parents),
    }:
        listed = Path(os.path.realpath(root / folder))
        if not real.is_relative_to(listed):
            continue
        if not any(part.startswith(".") for part in real.relative_to(listed).parts):
            raise UserError(
                f"{path} is inside the data folder {root / folder}, so its figures "
                f"would become training images: give a {flag} outside of it"
            )


@contextlib.contextmanager
def goes_on_without(what: str) -> Iterator[None]:
    """Warn in one line, and continue, if `what` cannot be drawn or written."""
    try:
        yield
    except BadImageError as error:
        LOG.warning(f"{what} cannot be drawn ({error})")
    except OSError as error:
        LOG.warning(f"{what} cannot be written ({error.strerror or error})")


@contextlib.contextmanager
def told_in_one_line(workdir: Path) -> Iterator[None]:
    """Turn errors of a full, read-only or missing disk into a UserError."""
    try:
        yield
    except OSError as error:
        ours = error.filename and Path(error.filename).is_relative_to(workdir)
        if error.errno not in FULL and not ours:
            raise
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}: "
            f"{error.filename or 'a file in it'}): fix the disk, then run the same "
            "command to resume from the newest checkpoint"
        ) from error
