"""What a checkpoint was when it was saved: a digest of every leaf and of every file.

Those of the leaves are of the arrays in memory, so that what is restored can be
compared with what was saved, and the leaf be named. Those of the files notice every
changed bit, also in Orbax's own descriptions, before anything of them is believed.
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
CHUNK = 1 << 22  # bytes of a file that are read at a time


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a state on the host. dtype: its name, a key's too (`key<fry>`)."""

    dtype: str
    array: np.ndarray

    def digest(self) -> dict[str, Any]:
        """SHA-256 of the bytes, with what they mean."""
        data = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
        return {
            "dtype": self.dtype,
            "shape": list(self.array.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def is_finite(self) -> bool:
        """Whether no number of it is NaN or infinite."""
        inexact = jax.numpy.issubdtype(self.array.dtype, np.inexact)
        return not inexact or bool(np.isfinite(self.array).all())


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a state by their dotted names."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator="."): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_host(state: Any) -> dict[str, Leaf]:
    """Copies of all leaves, which the step that follows cannot overwrite."""
    leaves = {name: _data(leaf) for name, leaf in named_leaves(state).items()}
    for _, array in leaves.values():
        if isinstance(array, jax.Array) and array.is_fully_addressable:
            array.copy_to_host_async()  # all under way before the first is waited for
    return {name: Leaf(dtype, _copy(array)) for name, (dtype, array) in leaves.items()}


def write(folder: Path, leaves: Mapping[str, Leaf], position: Any) -> None:
    """Write the digests of a checkpoint that is whole, and all of it to the disk."""
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
    """What `write` has written; None where there is no such file.

    Raises DamagedError where a single bit of it has changed.
    """
    path = folder / FILE
    if not path.exists():
        return None
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        content.pop("sha256")
        # Written anew it must be the same, blanks and all.
        whole = _encoded(content) == raw
    except (ValueError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{folder} is damaged: {FILE} is not as it was written")
    return content


def check_files(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise DamagedError, which names them, where files are not as they were."""
    wrong = []
    for name, expected in content["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                wrong.append(f"{name} has {size} bytes of {expected['size']}")
            elif _of_file(path) != expected:
                wrong.append(f"{name} is not as it was written")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
    _raise(folder, wrong)


def check_leaves(folder: Path, content: Mapping[str, Any], state: Any) -> None:
    """Raise DamagedError where leaves of `state`, as restored, are not as they were."""
    wrong = []
    for name, leaf in named_leaves(state).items():
        dtype, array = _data(leaf)
        if Leaf(dtype, _view(array)).digest() != content["leaves"].get(name):
            wrong.append(f"{name} is not the array that was saved")
    _raise(folder, wrong)


def differences(content: Mapping[str, Any], like: Any) -> list[str]:
    """Where the leaves of `like` are of another dtype or shape than those saved."""
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
    """Write a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _data(leaf: Any) -> tuple[str, Any]:
    """A leaf's dtype, and the numbers it consists of."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), jax.random.key_data(leaf)
    return str(leaf.dtype), leaf


def _view(array: Any) -> np.ndarray:
    """The whole of an array, from all processes where it is divided over them."""
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
        return (
            view.copy()
        )  # the view is the device's memory: the next step writes to it
    return view


def _of_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Size and SHA-256; with `sync` the file is written to the disk besides."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return {"size": size, "sha256": found.hexdigest()}


def _encoded(content: Mapping[str, Any]) -> bytes:
    """The bytes of the digests' file, which hold their own digest."""
    body = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{json.dumps({**content, 'sha256': digest}, sort_keys=True)}\n".encode()


def _raise(folder: Path, wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedError(f"{folder} is damaged: {'; '.join(wrong[:3])}{more}")
