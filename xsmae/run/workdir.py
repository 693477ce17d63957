"""What a run leaves besides its numbers: its config and the environment it ran in."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_collections

from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import EXECUTION_FIELDS, flatten
from xsmae.errors import BadImageError, UserError
from xsmae.process.environment import describe_environment
from xsmae.process.files import write_json
from xsmae.process.log import LOG

# Fields that change neither the batches nor, except for rounding, the numbers: they may
# differ on resuming. A name that ends with a dot is a whole group of fields. What the
# kNN accuracy is of (k, temperature, the images) may not change within one run's curve.
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
    "data.root",
    "data.csv_path",
    "data.gsd_csv",
    "data.data_dir",
    "tensorboard",
    "wandb",
)

# What a disk says that takes nothing more, also where it does not say for which file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of `new` differs from `old`, one text a field, free fields left out."""
    old, new = flatten(old), flatten(new)
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]


def _is_free(name: str) -> bool:
    """True if a field may differ on resuming."""
    groups = tuple(field for field in FREE_FIELDS if field.endswith("."))
    return name in FREE_FIELDS or name.startswith(groups)


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Make the folder and its `config.json`, or check that it is the same run's.

    A run that has saved no checkpoint yet may be begun anew with another config.
    Raises UserError where the folder cannot be written to or is of another config.
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
                    f"{workdir} holds a run of another config: {'; '.join(found)}. "
                    "Give that config to go on with it, or a new --workdir"
                )
        write_json(path, resolved)
        write_json(workdir / "environment.json", describe_environment())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not JSON ({error}): give a new --workdir, or remove the file "
            "to go on with this one"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror}; give another "
            "--workdir"
        ) from None


def check_outside_data(
    path: Path, data: Mapping[str, Any], ids: Iterable[str] = (), *, flag: str
) -> None:
    """Raise UserError if pictures written to `path` would be images of `data`.

    Only a folder is listed again and again. ids: its images, whose folders may be links
    that lead out of it. A hidden folder is not listed. flag: what gave `path`.
    """
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
                f"{path} lies in the data's folder {root / folder}, of which its "
                f"pictures would become images: give {flag} outside of it"
            )


@contextlib.contextmanager
def goes_on_without(what: str) -> Iterator[None]:
    """Say in one line what could not be drawn or written inside, and go on."""
    try:
        yield
    except BadImageError as error:
        LOG.warning(f"{what} cannot be drawn ({error})")
    except OSError as error:
        LOG.warning(f"{what} cannot be written ({error.strerror or error})")


@contextlib.contextmanager
def told_in_one_line(workdir: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone, as the user's error."""
    try:
        yield
    except OSError as error:
        ours = error.filename and Path(error.filename).is_relative_to(workdir)
        if error.errno not in FULL and not ours:
            raise
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}: "
            f"{error.filename or 'a file of it'}); mend that, and the same command "
            "goes on from the newest checkpoint"
        ) from error
