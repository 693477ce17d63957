"""Starts a run from existing weights: an import, or another run's workdir."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import ml_collections

from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import EXECUTION_FIELDS
from xsmae.errors import UserError
from xsmae.process.files import write_json
from xsmae.train_state import TrainState

# These fields are taken from the weights' own config, except the fields that say how
# the network runs: those stay the new run's.
TAKEN = ("model", "loss", "bands", "mean", "std", "views.size")
KEPT_EXECUTION = ("model.dtype", *EXECUTION_FIELDS)


# The workdir's copy of the weights' config, so that resuming does not need
# `config.init`.
KEPT = "init.json"


def adopt(
    config: ml_collections.ConfigDict,
    given: Iterable[str],
    *,
    workdir: Path | None = None,
) -> list[str]:
    """Set the fields of `config` that the weights in `config.init` decide.

    Returns a line per changed field. Fields in `given` (dotted names that the user set)
    stay. A run that resumes in `workdir` reads the copy there, because the folder of
    the weights may have moved or changed.
    """
    path = Path(config.init) / "config.json"
    if workdir is not None and has_checkpoint(workdir) and (workdir / KEPT).exists():
        path = workdir / KEPT
    elif (Path(config.init) / "encoder").is_dir() and not path.exists():
        raise UserError(
            f"init={config.init} has only an encoder, expected a whole network: give "
            "an import with its decoder, or a run's workdir"
        )
    try:
        saved = json.loads(path.read_text())
        method = saved["method"]
    except (OSError, ValueError, KeyError, TypeError):
        if path.name == KEPT:
            raise UserError(
                f"{path} is damaged, expected the config of the weights: copy it from "
                f"{Path(config.init) / 'config.json'}, or give a new --workdir"
            ) from None
        raise UserError(
            f"init={config.init} has no config.json with a method, expected an import "
            "or a run's workdir: give one"
        ) from None
    if method != config.method:
        raise UserError(
            f"init={config.init} has the method {method}, but the config has "
            f"{config.method}: give configs/NAME.py:method={method}"
        )
    found, ours = (fields.get("dtype") or "uint8" for fields in (saved, config))
    if found != ours:
        raise UserError(
            f"init={config.init} was trained on {found} images, the config's are "
            f"{ours}: give weights of the same dtype"
        )
    kept, changed = {*KEPT_EXECUTION, *given}, []
    with config.ignore_type(), config.unlocked():
        for name in TAKEN:
            part = saved
            for key in name.split("."):
                part = part.get(key, {}) if isinstance(part, dict) else {}
            _take(config, name, part, kept, changed)
    return changed


def _take(config, name: str, value, kept: set[str], changed: list[str]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _take(config, f"{name}.{key}", part, kept, changed)
        return
    *parents, key = name.split(".")
    owner = config
    for parent in parents:
        if parent not in owner:
            raise _unknown(config, name)
        owner = owner[parent]
    if key not in owner:
        raise _unknown(config, name)
    value = _as_tuple(value)
    if name not in kept and owner[key] != value:
        changed.append(f"{name} {owner[key]} -> {value}")
        owner[key] = value


def _unknown(config, name: str) -> UserError:
    return UserError(
        f"the config of init={config.init} has {name}, which this version of xsmae "
        "does not know: give other weights, or use the version that wrote them"
    )


def _as_tuple(value):
    """Convert JSON's lists to tuples, as configs have them."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def keep_config(directory: str | Path, workdir: Path) -> None:
    """Copy the config of the weights in `directory` to `workdir`, for `adopt`."""
    saved = json.loads((Path(directory) / "config.json").read_text())
    write_json(workdir / KEPT, saved)


def load_weights(directory: str | Path, state: TrainState) -> dict:
    """The `params` and `batch_stats` of the newest checkpoint in `directory`.

    Shapes and placement are those of `state`.
    """
    if not (Path(directory) / "checkpoints").is_dir():
        raise UserError(
            f"init={directory} has no folder checkpoints: give an import or a run's "
            "workdir"
        )
    checkpoints = Checkpoints(Path(directory) / "checkpoints", read_only=True)
    try:
        like = {"params": state.params, "batch_stats": state.batch_stats}
        return checkpoints.restore_weights(like)
    finally:
        checkpoints.close()
