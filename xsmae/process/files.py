"""Files that are written whole or not at all, and JSON lines that a run resumes."""

from __future__ import annotations

import contextlib
import json
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xsmae.process.log import LOG


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which takes its place at the end.

    After an error `path` is as it was, and nothing else is left. The file gets the
    mode of any new file, whatever mode its writer gave it.
    """
    # The dot and the last suffix keep it out of patterns such as "*.png".
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode  # as the umask has it
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors makes its files with 600
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file in which each line tells what a run has done by a `step`.

    Without the half-written last one of a kill; a damaged one before it is passed over,
    and said to be. [] if there is no file.
    """
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                LOG.warning(f"{path}: line {number} is damaged and left out")
    return rows


def keep_rows(path: Path, up_to_step: int | None) -> list[dict[str, Any]]:
    """Rewrite a file of `read_jsonl` without the rows of later steps; returns the rest.

    A run that resumes from a step writes the later ones again. None, for a run that
    begins, keeps no row. A file that is not there is not made.
    """
    if not path.exists():
        return []
    rows = [] if up_to_step is None else read_jsonl(path)
    rows = [row for row in rows if row["step"] <= up_to_step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_json(path: Path, content: Any) -> None:
    """Write a file so that it is either the old one or the new one, never a half."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
