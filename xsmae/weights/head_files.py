"""The folder of a trained head: its weights, its description and its encoder.

HEAD/head.safetensors   the weights of the head
HEAD/head.json          what it is: task, classes, digests, how it was trained
HEAD/encoder/           the encoder that it reads, frozen or trained with it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xsmae.errors import UserError
from xsmae.models.vit import Encoder as Network
from xsmae.process.files import atomic_write, write_json
from xsmae.weights.encoder import Encoder, load_encoder
from xsmae.weights.layouts import leaves

SCHEMA = 1
TASKS = ("segment", "classify")


class Trained(Protocol):
    """What a saved head needs of an encoder: an `Encoder`, or one of an evaluation."""

    info: Mapping[str, Any]
    network: Network
    dtype: str


def tensors_of(*states: nnx.State) -> dict[str, np.ndarray]:
    """The arrays of some states, by their dotted names."""
    found = {}
    for state in states:
        found |= leaves(nnx.State(state))
    return {_name(path): np.asarray(leaf) for path, leaf in found.items()}


def write_head(
    folder: Path,
    encoder: Encoder,
    tensors: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    *,
    beside: Path | None = None,
) -> None:
    """Write a head and the encoder that it reads.

    fields: of head.json, without the schema and the digests. beside: another head. If
    it has the same encoder, the two share its files on disk by hard links.
    """
    weights = save(dict(tensors))
    if beside is None or not _link_encoder(folder, encoder, beside):
        encoder.save(folder / "encoder")
    with atomic_write(folder / "head.safetensors") as temporary:
        temporary.write_bytes(weights)
    content = {
        "schema": SCHEMA,
        **fields,
        "encoder": encoder.digest,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    # Last: until then the digests do not match, and the folder is refused.
    write_json(folder / "head.json", content)


def _link_encoder(folder: Path, encoder: Encoder, other: Path) -> bool:
    """Link the encoder of another head; False if it has another or cannot be linked."""
    if read_description(other / "head.json")["encoder"] != encoder.digest:
        return False
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    try:
        for file in (other / "encoder").iterdir():
            target = folder / "encoder" / file.name
            target.unlink(missing_ok=True)
            target.hardlink_to(file)
    except OSError:  # a file system without links
        return False
    return True


def read_description(path: Path) -> dict[str, Any]:
    """The content of a `head.json` of a known schema and task; UserError if not."""
    if not path.exists():
        raise UserError(f"{path.parent} has no head.json: give the folder of a head")
    try:
        info = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = info if isinstance(info, dict) else {}
    for name, known in (("schema", (SCHEMA,)), ("task", TASKS)):
        if found.get(name) not in known:
            raise UserError(
                f"{path} has {name}={found.get(name)!r}, expected "
                f"{' or '.join(map(repr, known))}: use the version of xsmae that wrote "
                "it, or give another head"
            )
    return info


def check_fields(
    path: Path,
    info: Mapping[str, Any],
    required: Iterable[str],
    checks: Callable[[Mapping[str, Any]], Mapping[str, bool]],
) -> None:
    """Raise UserError if a `head.json` lacks a field or has an impossible one.

    checks(info) -> name of a field: True if its value is possible.
    """
    missing = [name for name in required if name not in info]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    wrong = [name for name, good in checks(info).items() if not good]
    if wrong:
        raise UserError(
            f"{path} has {wrong[0]}={info[wrong[0]]!r}, which no head has: restore the "
            "file"
        )


def read_head(
    folder: Path, info: Mapping[str, Any]
) -> tuple[Encoder, dict[str, np.ndarray]]:
    """The encoder of a head, and its tensors; UserError if one is not that of `info`.

    The encoder computes in the `dtype` of the head's architecture.
    """
    encoder = load_encoder(folder / "encoder")
    if encoder.digest != info["encoder"]:
        raise UserError(
            f"{folder}/encoder has the digest {encoder.digest}, expected "
            f"{info['encoder']}: it is not the encoder of this head; restore it"
        )
    try:
        content = (folder / "head.safetensors").read_bytes()
        tensors = load(content)
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{folder}/head.safetensors cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != info["weights"]:
        raise UserError(
            f"{folder}/head.safetensors is damaged, or of another head than head.json: "
            "restore it"
        )
    return encoder, tensors


def in_dtype(encoder: Encoder, info: Mapping[str, Any]) -> Encoder:
    """The encoder in the `dtype` of a head's architecture, by default float32."""
    dtype = info["architecture"].get("dtype", "float32")
    if dtype == encoder.dtype:
        return encoder
    return Encoder(encoder.network, encoder.info, dtype=dtype)


def build(folder: Path, new: Callable[[], nnx.Module]) -> nnx.Module:
    """The module of `new`, with shapes only; UserError if head.json is inconsistent."""
    try:
        return nnx.eval_shape(new)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/head.json is inconsistent: {reason}") from None


def fill(model: nnx.Module, tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """Put the tensors of a file into `model`, in place."""
    expected = {_name(path): leaf.shape for path, leaf in leaves(model).items()}
    check_shapes(tensors, expected, folder)
    state = nnx.state(model)
    paths = [_name(path) for path in leaves(state)]
    tree = jax.tree.structure(state)
    new = [jnp.asarray(tensors[path]) for path in paths]
    nnx.update(model, jax.tree.unflatten(tree, new))


def check_shapes(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Raise UserError, with the name, for a tensor of another shape than expected."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{folder}/head.safetensors does not fit head.json: {name} expected "
                f"{expected.get(name, 'nothing')}, found {shapes.get(name, 'nothing')}"
            )


def digest_of(info: Mapping[str, Any], names: Sequence[str]) -> str:
    """16 hexadecimal digits of some fields of a `head.json` and of all weights."""
    told = {name: info[name] for name in (*names, "encoder", "weights")}
    told = json.dumps(told, sort_keys=True).encode()
    return hashlib.sha256(told).hexdigest()[:16]


def is_whole(value: Any, low: int, high: float = float("inf")) -> bool:
    """True if `value` is a whole number from `low` to `high`."""
    return type(value) is int and low <= value <= high


def are_named(entries: Any) -> bool:
    """True if `entries` are classes, each with a name."""
    return (
        isinstance(entries, list)
        and bool(entries)
        and all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in entries)
    )


def _name(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))
