"""What a folder of embeddings has: a list of scenes, files and digests.

A command of one part of the scenes (`--shard`) keeps a list of its own; `merge` joins
them. The list of a folder does not depend on the order of the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xsmae.errors import UserError, printable
from xsmae.process.files import write_json

SCHEMA = 1
NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 0 on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """0/4, 1/4, ... 3/4; UserError for other texts."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise UserError(
                f"--shard={text}, expected INDEX/COUNT with INDEX from 0 on, such as "
                "0/4 to 3/4"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def manifest(self) -> str:
        """The name of its list."""
        return f"manifest-{self.index}-of-{self.count}.json"


def digest_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": found}


@dataclasses.dataclass
class Manifest:
    """The list of one folder, or of one shard.

    wanted: names of all scenes of the commands. scenes: name -> job, source, rows and
    files with their digests. failed: name -> reason. Threads may share it.
    """

    path: Path
    wanted: list[str] = dataclasses.field(default_factory=list)
    scenes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The list in a file, empty without one; UserError if it is damaged."""
        if not path.exists():
            return cls(path)
        try:
            told = json.loads(path.read_text())
            if told["schema"] != SCHEMA:
                raise ValueError(f"schema {told['schema']}, expected {SCHEMA}")
            return cls(
                path, list(told["wanted"]), dict(told["scenes"]), dict(told["failed"])
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{printable(str(path))} is damaged ({error}): remove it; files that "
                "are there are looked at again"
            ) from None

    def write(self) -> None:
        """Write the list, sorted."""
        content = {
            "schema": SCHEMA,
            "wanted": sorted(set(self.wanted)),
            "scenes": dict(sorted(self.scenes.items())),
            "failed": dict(sorted(self.failed.items())),
        }
        write_json(self.path, content)

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """A scene is finished."""
        with self._lock:
            self.scenes[name] = entry
            self.failed.pop(name, None)
            self.write()

    def fail(self, name: str, reason: str) -> None:
        """A scene failed; files of an earlier command stay listed."""
        with self._lock:
            self.failed[name] = reason
            self.write()

    def has(self, name: str, job: str, file: str) -> bool:
        """True if the scene's files are there, undamaged, and of this job.

        file: one of them.
        """
        entry = self.scenes.get(name)
        if entry is None or entry["job"] != job or file not in entry["files"]:
            return False
        folder = self.path.parent
        return all(
            (folder / file).is_file() and digest_of(folder / file) == told
            for file, told in entry["files"].items()
        )


def merge(folder: Path) -> Manifest:
    """Join the lists of all shards of a folder, and remove them.

    Raises UserError if a shard is missing, or has not finished.
    """
    found = [(p, re.fullmatch(r"manifest-(\d+)-of-(\d+)\.json", p.name))
             for p in folder.glob("manifest-*.json")]  # fmt: skip
    shards = {(int(m[2]), int(m[1])): path for path, m in found if m}
    counts = {count for count, _ in shards}
    where = printable(str(folder))
    if len(counts) != 1:
        raise UserError(
            f"{where} has lists of {' and '.join(map(str, sorted(counts))) or 'no'} "
            "shards, expected those of one --shard=INDEX/COUNT: remove the others"
        )
    (count,) = counts
    missing = [str(i) for i in range(count) if (count, i) not in shards]
    if missing:
        raise UserError(
            f"{where} lacks the shards {', '.join(missing)} of {count}: run them first"
        )
    whole = Manifest.read(folder / NAME)
    for path in shards.values():
        part = Manifest.read(path)
        whole.wanted += part.wanted
        whole.scenes |= part.scenes
        whole.failed |= part.failed
    for name in whole.scenes.keys() & whole.failed.keys():
        if any(name in Manifest.read(path).scenes for path in shards.values()):
            whole.failed.pop(name)
    undone = _names(set(whole.wanted) - whole.scenes.keys() - whole.failed.keys())
    if undone:
        raise UserError(f"{where} lacks {undone}: run the shards again")
    whole.write()
    for path in shards.values():
        path.unlink()
    return whole


def _names(names: Iterable[str]) -> str:
    """Some of the names, in one line."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more
