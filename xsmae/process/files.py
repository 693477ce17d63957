"""Atomic writes of files, and JSON-lines files that a resumed run continues."""

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
    """Yields a temporary path in the folder of `path`, and renames it at the end.

    After an error, `path` is unchanged and no other file is left. The file gets the
    default mode of new files, whatever mode its writer gave it.
    """
    # The dot and the last suffix keep it out of patterns such as "*.png".
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode  # the default mode under the umask
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors creates files with mode 600
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; each row has a `step`.

    Skips a last line that a kill left half-written. Skips other damaged lines with a
    warning. Returns [] if there is no file.
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
                LOG.warning(f"{path}: line {number} is damaged and skipped")
    return rows


def keep_rows(path: Path, up_to_step: int | None) -> list[dict[str, Any]]:
    """Removes the rows after `up_to_step` from a JSON-lines file; returns the rest.

    A run that resumes from a step writes the later rows again. None, for a new run,
    removes all rows. A missing file is not created.
    """
    if not path.exists():
        return []
    rows = [] if up_to_step is None else read_jsonl(path)
    rows = [row for row in rows if row["step"] <= up_to_step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
