"""Reads PyTorch checkpoints and safetensors as numpy arrays, without executing code.

A file of `torch.save` contains a pickle, and a pickle is a program. This module
interprets only the instructions and names that tensors need. None of them can do harm.
Everything else is refused by name. The formats are those of PyTorch's serialization.py:
a zip of `data.pkl` and `data/KEY`, or (before 1.6) five pickles, then the storages.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import load_file

from xsmae.errors import UserError
from xsmae.weights.torch_pickle import AGAIN, LIMIT, WEIGHTS, Reader, require

LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
LEGACY_VERSION = 1001
DEFLATION = 16  # weights hardly compress; a zip that expands by more is a zip bomb


def read_pytorch(path: str | os.PathLike[str]) -> object:
    """The object that `torch.save` or safetensors wrote, with tensors as numpy arrays.

    PyTorch's tensors become read-only views of their storages: they keep their strides,
    and share memory where they did. bfloat16 becomes `ml_dtypes.bfloat16`,
    `argparse.Namespace` becomes `Namespace`, parameters become arrays, paths become
    strings, sizes and devices become tuples, dtypes become numpy's. Raises UserError if
    the file cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{found}; give a checkpoint (.pth, .pt, .safetensors)")
        with path.open("rb") as file:
            return _read(path, file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].strip(": ")
        raise UserError(
            f"{path}: cannot be read: it is cut short, damaged or not a checkpoint "
            f"({ascii(reason)[1:-1]}); {AGAIN}"
        ) from error


def _read(path: Path, file: BinaryIO) -> object:
    """Read `file` in the format that its first bytes show."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    file.seek(0)
    require(head, "is empty (0 bytes)")
    if head.startswith(b"PK\3\4"):
        return _read_zip(file, size)
    if head.startswith(pickle.PROTO) and LEGACY_MAGIC in head:
        return _read_legacy(file, size)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return load_file(path)
    if head.decode("utf-8", "ignore").replace("\n", " ").strip().isprintable():
        raise UserError(
            f"is text that begins with {head.strip()[:32]!a}, perhaps a web page "
            f"instead of the download; expected a checkpoint: {AGAIN}"
        )
    raise UserError(
        f"begins with {head[:8]!a}; expected a complete checkpoint of torch.save or "
        f"safetensors: {AGAIN}, or {WEIGHTS}"
    )


def _read_zip(file: BinaryIO, size: int) -> object:
    """Read a zip of torch.save (1.6 or later). Reads each storage when first named."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    twice = len(entries) != len(archive.infolist())
    require(not twice, "is a zip with two entries of the same name")
    roots = [
        name.removesuffix("data.pkl")
        for name in entries
        if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)
    ]
    require(
        len(roots) == 1,
        f"is a zip ({', '.join(ascii(name[:40]) for name in list(entries)[:3])}, ...) "
        f"without one data.pkl; expected a checkpoint",
        WEIGHTS,
    )
    (root,) = roots
    code = (f"{root}code/", f"{root}constants.pkl")
    require(
        not any(name.startswith(code) for name in entries),
        "is a TorchScript archive, a program; expected a checkpoint",
        f"{WEIGHTS} (torch.jit.load gives the model)",
    )

    def content(name: str, limit: int) -> bytes:
        entry = entries.get(root + name)
        require(entry, f"lacks {name[:40]!a}")
        size, kind = entry.file_size, entry.compress_type
        require(
            size <= limit and kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
            f"has {size} bytes in {name[:40]!a} (compression {kind}); expected at most "
            f"{limit}, stored or deflated",
            WEIGHTS,
        )
        with archive.open(entry) as stream:
            # With a length given, it never inflates more than that.
            return stream.read(size)

    little = f"{root}byteorder" not in entries or content("byteorder", 9) == b"little"
    require(little, "was saved big-endian; expected little-endian", WEIGHTS)

    def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        nbytes = numel * dtype.itemsize
        data = content(f"data/{key}", nbytes)
        require(len(data) == nbytes, f"ends within storage {key[:40]!a}")
        return np.frombuffer(data, dtype)

    pickled = io.BytesIO(content("data.pkl", LIMIT))
    return Reader(pickled, storage, LIMIT + DEFLATION * size).load()


def _read_legacy(file: BinaryIO, size: int) -> object:
    """Read a file of torch.save before 1.6, where storages follow the tensors."""

    def storage(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        return np.empty(numel, dtype)

    with mmap.mmap(file.fileno(), min(size, LIMIT), access=mmap.ACCESS_READ) as pickles:
        _magic, version, system = (Reader(pickles).load() for _ in range(3))
        require(
            version == LEGACY_VERSION and system["little_endian"] is True,
            "was saved big-endian or by an unknown version of the format",
            WEIGHTS,
        )
        reader = Reader(pickles, storage, size)
        value = reader.load()
        keys = Reader(pickles).load()
        file.seek(pickles.tell())
    require(
        type(keys) is list
        and all(type(key) is str for key in keys)
        and sorted(keys) == sorted(reader.storages),
        "lists storages that differ from those of its tensors",
    )
    for key in keys:
        data = reader.storages[key]
        numel = int.from_bytes(file.read(8), "little")
        require(
            numel == data.size and file.readinto(data.view(np.uint8)) == data.nbytes,
            f"is cut short or damaged in storage {key[:40]!a}",
        )
    return value
