"""The result row: a number, its interval, and everything that it depends on."""

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
AVERAGE = "average"  # the value of `scale` in a row that averages over scales
CROP = "largest central square"  # the part of an image that is used
CHANGES = ("standardize", "block")  # options that change the features of a task


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that decides a number, except the encoder, the scale and the seed.

    Only rows with equal protocols share a table. task: `knn`, `linear_probe`, ...
    metric: `accuracy` or `mIoU`. data: `Parts.describe()`. base_size: pixels at 100 %;
    0 if images keep their own size. resize, crop: how images are brought to their size.
    gsd_policy: `true` or `fixed`. options: the task's own numbers, such as k and
    temperature. interval: how the interval is computed.
    """

    task: str
    metric: str
    data: Mapping[str, Any]
    base_size: int
    resize: str
    gsd_policy: str
    options: Mapping[str, Any]
    interval: Mapping[str, Any]
    crop: str = CROP

    @property
    def title(self) -> str:
        """The task, with the options that change its features: `knn (block=8)`."""
        changes = [f"{n}={self.options[n]}" for n in CHANGES if n in self.options]
        return self.task + f" ({', '.join(changes)})" * bool(changes)

    @property
    def key(self) -> str:
        """8 hexadecimal digits that are equal for equal protocols."""
        content = dataclasses.asdict(self)
        # The fingerprints identify the data; its name does not matter.
        content["data"] = {k: v for k, v in self.data.items() if k != "name"}
        return _digest(content)[:8]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of `results.jsonl`.

    encoder: name, kind, digest, origin, normalization, architecture, pooling, and the
    gsd_range of training if it is known. feature: which of its features.
    feature_scaling: how the feature was scaled. scale: percent of the base size, or
    `average` (over `scales`). size: pixels, a list for the average. gsd_told: the
    median metres per pixel that the encoder got, None if it reads no GSD. value, low,
    high: the metric in 0-1 and its interval. class_names: in label order. per_class:
    class -> metric, for classes with test images. confusion: counts [true
    class][predicted class], None for the average. num_train, num_test: images used.
    unusable: images left out, per part. leaks: test images with the same pixels as a
    training image. seconds, images_per_second: of the extraction, None if the features
    were cached. run: versions, devices, time. metrics: other metrics -> value, low,
    high. files: the folder of what is kept beside the row, such as the trained head.
    cells: of an evaluation across scales, [scale of the bank][scale of the queries] ->
    value, low, high; both in the order of `scales`.
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
    metrics: Mapping[str, list[float]] | None = None
    files: str | None = None
    cells: list[list[list[float]]] | None = None

    @property
    def identity(self) -> str:
        """A digest that is equal for rows that measure the same thing the same way."""
        return identity(
            self.protocol, self.encoder, self.feature, self.column, self.seed
        )

    @property
    def column(self) -> tuple:
        """The row's column in the table of its protocol."""
        return column(self.scale, self.size, self.scales)

    def to_json(self) -> str:
        """The line, without a newline."""
        row = {"schema": SCHEMA, "protocol_key": self.protocol.key}
        return json.dumps(row | dataclasses.asdict(self))


def column(
    scale: float | str, size: int | list[int], scales: list[float] | None = None
) -> tuple:
    """(scale, size), or (`average`, scales, sizes) for an average over scales."""
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
    """The `Result.identity` of a row that is not computed yet."""
    return _digest([protocol.key, encoder["digest"], feature, column, seed])


def append(path: Path, result: Result) -> bool:
    """Add one row like `append_all`; True if it was added."""
    return bool(append_all(path, [result]))


def append_all(path: Path, results: Iterable[Result]) -> list[Result]:
    """Add the rows whose identity is not in the file yet; returns the added rows.

    The file is locked and read once. One write adds all new lines or none. An
    incomplete last line, which a crash may leave, is removed. Raises UserError if the
    file cannot be written or has lines that are not result rows.
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
            f"cannot write to {path}: {error.strerror}; the file is unchanged: free "
            "space or fix its permissions, then run the same command again to resume"
        ) from None
    finally:
        os.close(file)


def check_writable(path: Path) -> None:
    """Raise UserError if rows could not be added to `path`, before any is computed.

    Does not create the file.
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
    """Append all `lines` to a file of `after` bytes, or leave it as it was."""
    try:
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError:
        os.ftruncate(file, after)
        raise


def read_results(path: str | os.PathLike) -> list[Result]:
    """The rows of a `results.jsonl`, like `read`; UserError if there is no file."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give the results.jsonl of an evaluation"
        )
    return read(path)


def read(path: Path) -> list[Result]:
    """The rows of a `results.jsonl`; [] if there is no file.

    Ignores an incomplete last line. Raises UserError, with the line number, for a line
    that is not a result row of this schema.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _parse(content: bytes, path: Path) -> list[Result]:
    """The rows in `content`, complete lines of `path`."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            schema = row.pop("schema")
            if schema != SCHEMA:
                raise UserError(
                    f"line {number} of {path} has schema {schema!r}, expected {SCHEMA}"
                    ": another version of xsmae wrote it; give another file"
                )
            row.pop("protocol_key")
            row["protocol"] = Protocol(**row["protocol"])
            rows.append(Result(**row))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"line {number} of {path} is not a result row "
                f"({type(error).__name__}: {error}): remove the line"
            ) from None
    return rows


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
