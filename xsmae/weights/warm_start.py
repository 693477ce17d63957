"""Starts a run from existing weights: an import, or another run's workdir."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import nnx

from xsmae.checkpoints import Checkpoints
from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import EXECUTION_FIELDS
from xsmae.errors import UserError
from xsmae.process.files import write_json
from xsmae.sharding import replicated
from xsmae.train_state import TrainState
from xsmae.weights.band_matching import (
    MATCHED,
    Layout,
    check_method,
    describe_match,
    groups_for,
    moved,
    shapes_of,
)
from xsmae.weights.layouts import leaves

# These fields are taken from the weights' own config, except the fields that say how
# the network runs: those stay the new run's.
TAKEN = ("model", "loss", "bands", "mean", "std", "views.size")
# The same, but configs of 8-bit images do not have them.
TAKEN_IF_KNOWN = ("dtype", "units", "wavelengths")
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
    found, ours = (fields.get("dtype", "uint8") for fields in (saved, config))
    if ours is not None and found != ours:
        raise UserError(
            f"init={config.init} was trained on {found} images, the config's are "
            f"{ours}: give weights of the same dtype"
        )
    kept, changed = {*KEPT_EXECUTION, *given}, []
    known = [name for name in TAKEN_IF_KNOWN if name in config]
    with config.ignore_type(), config.unlocked():
        saved = _for_bands_of_run(config, saved, kept, changed)
        for name in (*TAKEN, *known):
            part = saved
            for key in name.split("."):
                part = part.get(key, {}) if isinstance(part, dict) else {}
            _take(config, name, part, kept, changed)
    return changed


def _for_bands_of_run(
    config: ml_collections.ConfigDict,
    saved: Mapping[str, Any],
    kept: set[str],
    changed: list[str],
) -> Mapping[str, Any]:
    """The config of the weights, `saved`, for the bands that the run is to read.

    The user names these in `bands` or `data.bands`. By default they are those of the
    weights, which `data.bands` then chooses by name. A None in `mean` and `std` stands
    for a band that the weights lack, and is measured.
    """
    old, data = tuple(saved.get("bands", ())), config.get("data", {})
    if not old:
        return saved
    chosen = data.get("bands")
    new = tuple((config.bands if "bands" in kept else None) or chosen or old)
    if "bands" in data and chosen is None:
        data.bands = new
        changed.append(f"data.bands None -> {new}")
    model = dict(saved["model"])
    if new != old:
        check_method(saved["method"], old, new)
        groups = groups_for(model, old, new)
        model |= {"channel_groups": groups} if groups else {}
    if saved["method"] in MATCHED:
        own = dict(model)
        if "model.channel_groups" in kept:
            own["channel_groups"] = config.model.channel_groups
        layouts = Layout.of(saved["model"], old), Layout.of(own, new)
        if layouts[0] != layouts[1]:
            changed.append(describe_match(*layouts))
    if new == old:
        return saved
    statistics = {
        name: [dict(zip(old, saved[name], strict=True)).get(band) for band in new]
        for name in ("mean", "std")
    }
    # The wavelengths are chosen by the source.
    fitted = {**statistics, "bands": list(new), "model": model, "wavelengths": None}
    return {**saved, **fitted}


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


def load_weights(
    directory: str | Path,
    state: TrainState,
    config: ml_collections.ConfigDict | None = None,
) -> dict:
    """The `params` and `batch_stats` of the newest checkpoint in `directory`.

    Shapes and placement are those of `state`. config: the run's; if it has other bands
    than the weights, they are fitted by name, and new bands keep those of `state`.
    """
    if not (Path(directory) / "checkpoints").is_dir():
        raise UserError(
            f"init={directory} has no folder checkpoints: give an import or a run's "
            "workdir"
        )
    checkpoints = Checkpoints(Path(directory) / "checkpoints", read_only=True)
    try:
        like = {"params": state.params, "batch_stats": state.batch_stats}
        layouts = None if config is None else _layouts(Path(directory), config)
        if layouts is None or layouts[0] == layouts[1]:
            return checkpoints.restore_weights(like)
        return _load_fitted(checkpoints, like, config, layouts, Path(directory))
    finally:
        checkpoints.close()


def _layouts(
    directory: Path, config: ml_collections.ConfigDict
) -> tuple[Layout, Layout] | None:
    """What the weights and the run read and predict; None if it does not matter."""
    saved = json.loads((directory / "config.json").read_text())
    if config.method not in MATCHED or "bands" not in saved:
        return None
    return (
        Layout.of(saved["model"], saved["bands"]),
        Layout.of(config.model.to_dict(), config.bands),
    )


def _load_fitted(
    checkpoints: Checkpoints,
    like: dict[str, nnx.State],
    config: ml_collections.ConfigDict,
    layouts: tuple[Layout, Layout],
    directory: Path,
) -> dict[str, nnx.State]:
    saved = json.loads((directory / "config.json").read_text())
    groups = layouts[0].read if layouts[0].grouped else ()
    model = {**config.model.to_dict(), "channel_groups": groups}
    shapes = shapes_of(
        config.method, model, bands=saved["bands"], view_size=config.views.size
    )
    placed = leaves(like["params"])
    whole = _replicated(next(iter(placed.values())).sharding)

    def struct(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        own = placed.get(path)
        alike = own is not None and own.shape == leaf.shape
        sharding = own.sharding if alike else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.unflatten(
        jax.tree.structure(shapes["params"]),
        [struct(path, leaf) for path, leaf in leaves(shapes["params"]).items()],
    )
    found = checkpoints.restore_weights({**like, "params": params})
    pixels = config.model.patch_size**2
    return {**found, "params": moved(found["params"], like["params"], layouts, pixels)}


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return replicated(sharding.mesh)
    return sharding
