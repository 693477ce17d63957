"""Digests of every leaf and every file of a checkpoint, to detect damage.

Digests of leaves come from the arrays in memory. They compare a restored state with the
saved one and name the wrong leaf. Digests of files detect every changed bit, also in
Orbax's own metadata, before the files are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xsmae.errors import DamagedError

FILE = "digests.json"
SCHEMA = 1
CHUNK = 1 << 22  # bytes to read at a time


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a state on the host. dtype: its name; a key's is `key<fry>`."""

    dtype: str
    array: np.ndarray

    def digest(self) -> dict[str, Any]:
        """The SHA-256 of the bytes, with dtype and shape."""
        data = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
        return {
            "dtype": self.dtype,
            "shape": list(self.array.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def is_finite(self) -> bool:
        """True if no number is NaN or infinite."""
        inexact = jax.numpy.issubdtype(self.array.dtype, np.inexact)
        return not inexact or bool(np.isfinite(self.array).all())


def named_leaves(tree: Any) -> dict[str, Any]:
    """Maps dotted names to the leaves of a state."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator="."): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_host(state: Any) -> dict[str, Leaf]:
    """Copies all leaves to the host, so that the next step cannot overwrite them."""
    leaves = {name: _data(leaf) for name, leaf in named_leaves(state).items()}
    for _, array in leaves.values():
        if isinstance(array, jax.Array) and array.is_fully_addressable:
            array.copy_to_host_async()  # start all copies before waiting for the first
    return {name: Leaf(dtype, _copy(array)) for name, (dtype, array) in leaves.items()}


def write(folder: Path, leaves: Mapping[str, Leaf], position: Any) -> None:
    """Writes the digests of a complete checkpoint, and syncs its files to disk."""
    content = {
        "schema": SCHEMA,
        "files": {
            str(path.relative_to(folder)): _of_file(path, sync=True)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "leaves": {name: leaf.digest() for name, leaf in leaves.items()},
        "position": position,
    }
    with (folder / FILE).open("wb") as file:
        file.write(_encoded(content))
        file.flush()
        os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)


def read(folder: Path) -> dict[str, Any] | None:
    """The digests that `write` wrote; None if the file does not exist.

    Raises DamagedError if any bit of it changed.
    """
    path = folder / FILE
    if not path.exists():
        return None
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        content.pop("sha256")
        # Encoding it again must give the same bytes.
        whole = _encoded(content) == raw
    except (ValueError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{folder} is damaged: {FILE} has changed")
    return content


def check_files(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises DamagedError, with the files' names, if files have changed."""
    wrong = []
    for name, expected in content["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                wrong.append(f"{name} has {size} bytes, expected {expected['size']}")
            elif _of_file(path) != expected:
                wrong.append(f"{name} has changed")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
    _raise(folder, wrong)


def check_leaves(folder: Path, content: Mapping[str, Any], state: Any) -> None:
    """Raises DamagedError if leaves of the restored `state` differ from those saved."""
    wrong = []
    for name, leaf in named_leaves(state).items():
        dtype, array = _data(leaf)
        if Leaf(dtype, _view(array)).digest() != content["leaves"].get(name):
            wrong.append(f"{name} differs from the saved array")
    _raise(folder, wrong)


def differences(content: Mapping[str, Any], like: Any) -> list[str]:
    """Lists leaves of `like` whose dtype or shape differs from those saved."""
    found = {
        name: f"{leaf['dtype']}{leaf['shape']}"
        for name, leaf in content["leaves"].items()
    }
    expected = {}
    for name, leaf in named_leaves(like).items():
        shape = jax.eval_shape(lambda x: _data(x)[1], leaf).shape
        expected[name] = f"{leaf.dtype}{list(shape)}"
    return [
        f"{name}: expected {expected.get(name, 'nothing')}, found "
        f"{found.get(name, 'nothing')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]


def sync_folder(folder: Path) -> None:
    """Syncs a folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _data(leaf: Any) -> tuple[str, Any]:
    """A leaf's dtype and its numbers."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), jax.random.key_data(leaf)
    return str(leaf.dtype), leaf


def _view(array: Any) -> np.ndarray:
    """The whole array, gathered from all processes if they share it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _copy(array: Any) -> np.ndarray:
    view = _view(array)
    if isinstance(array, jax.Array) and any(
        d.platform == "cpu" for d in array.devices()
    ):
        return view.copy()  # the view is device memory that the next step overwrites
    return view


def _of_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size and SHA-256 of a file; `sync` also syncs it to disk."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return {"size": size, "sha256": found.hexdigest()}


def _encoded(content: Mapping[str, Any]) -> bytes:
    """The bytes of the digests' file, which include their own digest."""
    body = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{json.dumps({**content, 'sha256': digest}, sort_keys=True)}\n".encode()


def _raise(folder: Path, wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedError(f"{folder} is damaged: {'; '.join(wrong[:3])}{more}")
