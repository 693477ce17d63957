"""The frame around the work on one scene: what is there, locks, files in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from xsmae.data import gdal
from xsmae.errors import BadImageError, UserError, printable
from xsmae.process.files import write_json
from xsmae.process.lock import FolderLock
from xsmae.scenes.manifest import Manifest, digest_of

EMB = "emb"  # the key of the footer of a table, and the tag of a GeoTIFF


class Made(NamedTuple):
    """A finished file in the folder of the scene, what it holds, and its item.

    item(path of the file in its place): the STAC item, None if the scene has none.
    """

    path: Path
    rows: int
    item: Callable[[Path], dict[str, Any] | None]


def finish(
    manifest: Manifest,
    target: Path,
    job: str,
    source: str,
    make: Callable[[Path], Made],
) -> bool:
    """Make the file of a scene and its item; False if they were there already.

    target: the file, beside the manifest. job: a digest of what decides its content.
    make(folder): works in a folder that stays after a kill or on a full disk, and that
    no other process uses. Raises UserError if something else is in the way, or a file
    cannot be written.
    """
    name, folder = target.stem, target.parent
    if manifest.has(name, job, target.name):
        return False
    _check(target, job, manifest)
    unfinished = folder / f".{name}.unfinished"
    try:
        with FolderLock(unfinished):
            try:
                made = make(unfinished)
            except (UserError, BadImageError):
                shutil.rmtree(unfinished)  # the same command would end in the same way
                raise
            made.path.replace(target)
            files = [target]
            item = made.item(target)
            if item is not None:
                files.append(folder / f"{name}.json")
                write_json(files[-1], item)
            entry = {
                "job": job,
                "source": source,
                "rows": made.rows,
                "files": {file.name: digest_of(file) for file in files},
            }
            manifest.add(name, entry)
            shutil.rmtree(unfinished)
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(folder))}: {error.strerror or error}; the "
            "same command resumes"
        ) from None
    return True


def _check(target: Path, job: str, manifest: Manifest) -> None:
    """Raise UserError if the files of something else would be replaced."""
    entry = manifest.scenes.get(target.stem)
    if entry is not None and entry["job"] != job:
        there = [file for file in entry["files"] if (target.parent / file).exists()]
    else:
        there = [target.name] if target.exists() and entry is None else []
        if there and _job_of(target) == job:
            return
    if there:
        raise UserError(
            f"{printable(str(target.parent / there[0]))} is there, of another encoder, "
            "scene or options: give another --out, or remove it"
        )


def _job_of(target: Path) -> str | None:
    """The job of a file that is not listed; None if it has none."""
    from pyarrow import ArrowException, parquet

    try:
        if target.suffix == ".parquet":
            told = parquet.read_metadata(target).metadata[EMB.encode()]
        else:
            path = str(target.absolute())
            with gdal.borrowed(gdal.Name(path)) as dataset:
                told = dataset.tags()[EMB.upper()]
            gdal.close(path)
        return json.loads(told)["job"]
    except (OSError, ValueError, KeyError, TypeError, ArrowException):
        return None
