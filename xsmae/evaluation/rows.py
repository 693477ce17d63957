"""The result row: a number with its interval, and all that it depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xsmae.errors import UserError

SCHEMA = 1
AVERAGE = "average"  # the scale of a row that averages over scales


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All that decides a number but what is evaluated, at which scale and which seed.

    Only rows of equal protocols share a table. task: `knn`, `linear_probe`, ...;
    metric: `accuracy`. data: `Parts.describe()`. base_size: pixels at 100 %. resize,
    crop: how an image comes to its size. gsd_policy: `true` or `fixed`. options: the
    task's own numbers, such as k and temperature. interval: how it was found.
    """

    task: str
    metric: str
    data: Mapping[str, Any]
    base_size: int
    resize: str
    gsd_policy: str
    options: Mapping[str, Any]
    interval: Mapping[str, Any]
    crop: str = "largest central square"

    @property
    def key(self) -> str:
        """8 hexadecimal digits; equal protocols have equal ones."""
        content = dataclasses.asdict(self)
        # What the data is called: its fingerprints say what it is.
        content["data"] = {k: v for k, v in self.data.items() if k != "name"}
        return _digest(content)[:8]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of `results.jsonl`.

    encoder: name, kind, digest, origin, normalization, architecture, pooling. feature:
    which of its features, and feature_scaling what was done to it. scale: percent of
    the base size, or `average`, then over `scales`. size: pixels, a list for the
    average. gsd_told: median metres per pixel that the encoder was told, None where it
    reads none. value, low, high: the metric in 0-1 and its interval. class_names: in
    the order of the labels. per_class: class -> metric, of those with test images.
    confusion: counts, [true class][predicted class], None for the average. num_train,
    num_test: images used, `unusable` of each part left out. leaks: test images that
    equal a training image pixel for pixel. seconds, images_per_second: of the
    extraction where it ran now, else None. run: versions, device, time.
    """

    protocol: Protocol
    encoder: Mapping[str, Any]
    feature: str
    feature_scaling: str
    scale: float | str
    size: int | list[int]
    gsd_told: float | list[float] | None
    seed: int
    value: float
    low: float
    high: float
    class_names: list[str]
    per_class: Mapping[str, float]
    confusion: list[list[int]] | None
    num_train: int
    num_test: int
    unusable: Mapping[str, int]
    leaks: Mapping[str, Any]
    seconds: float | None
    images_per_second: float | None
    run: Mapping[str, Any]
    scales: list[float] | None = None

    @property
    def identity(self) -> str:
        """Equal for two rows that measure the same thing in the same way."""
        return identity(
            self.protocol, self.encoder, self.feature, self.column, self.seed
        )

    @property
    def column(self) -> tuple:
        """Which column of its protocol's table the row belongs in."""
        return column(self.scale, self.size, self.scales)

    def to_json(self) -> str:
        """The line, without its end."""
        row = {"schema": SCHEMA, "protocol_key": self.protocol.key}
        return json.dumps(row | dataclasses.asdict(self))


def column(
    scale: float | str, size: int | list[int], scales: list[float] | None = None
) -> tuple:
    """(scale, size), or for the average over scales (`average`, scales, sizes)."""
    if scale == AVERAGE:
        return (scale, tuple(map(float, scales)), tuple(size))
    return (float(scale), size)


def identity(
    protocol: Protocol,
    encoder: Mapping[str, Any],
    feature: str,
    column: tuple,
    seed: int,
) -> str:
    """What a row would have as its `identity`, before it is computed."""
    return _digest([protocol.key, encoder["digest"], feature, column, seed])


def append(path: Path, result: Result) -> bool:
    """Add one row as `append_all` does; True if it was added."""
    return bool(append_all(path, [result]))


def append_all(path: Path, results: Iterable[Result]) -> list[Result]:
    """Add the rows whose identity is not in the file yet; returns those added.

    The file is locked and read once, and all new lines reach the disk in one write, or
    none of them. Half a line, which a killed machine may have left at the end, is cut
    off. Raises UserError where the file cannot be written or holds other lines.
    """
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(file, whole)
        known = {row.identity for row in _parse(content[:whole], path)}
        new = {}
        for result in results:
            if result.identity not in known:
                new.setdefault(result.identity, result)
        if new:
            lines = "".join(result.to_json() + "\n" for result in new.values())
            _write_whole(file, lines.encode(), after=whole)
        return list(new.values())
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; its rows are as they were, and "
            "the same command goes on from what it has computed"
        ) from None
    finally:
        os.close(file)


def check_writable(path: Path) -> None:
    """Raise UserError where rows could not be added to `path`, before any is made.

    A file that is not there yet is not made.
    """
    with _as_user_error(path):
        if path.exists():
            os.close(_open(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()


def _open(path: Path) -> int:
    with _as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; give another --results"
        ) from None


def _write_whole(file: int, lines: bytes, *, after: int) -> None:
    """Append lines to the `after` bytes of a file, or nothing of them."""
    try:
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError:
        os.ftruncate(file, after)
        raise


def read_results(path: str | os.PathLike) -> list[Result]:
    """The rows of a `results.jsonl`, as `read`; raises UserError without file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the file of an evaluation's rows")
    return read(path)


def read(path: Path) -> list[Result]:
    """The rows of a `results.jsonl`, without half a line at its end; [] without file.

    Raises UserError, with the line, for what is no result row of this schema.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _parse(content: bytes, path: Path) -> list[Result]:
    """The rows of the whole lines of `path`."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            schema = row.pop("schema")
            if schema != SCHEMA:
                raise UserError(
                    f"line {number} of {path} has schema {schema!r}, expected {SCHEMA}"
                    ": it was written by another version of xsmae; give another file"
                )
            row.pop("protocol_key")
            row["protocol"] = Protocol(**row["protocol"])
            rows.append(Result(**row))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"line {number} of {path} is no result row "
                f"({type(error).__name__}: {error}); remove the line"
            ) from None
    return rows


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
