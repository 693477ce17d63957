"""Settings that follow the data, the device and the length of a run if they are unset.

A config leaves a field of `FIELDS` to be chosen by None. What is chosen at a run's
start stands in its `config.json`, from which a resumed run takes it: it chooses nothing
anew, whatever the device or the data look like by then.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import RANGES, flatten
from xsmae.configs.common import IMAGENET
from xsmae.data.records import Source
from xsmae.data.survey import survey
from xsmae.errors import BadImageError, UserError
from xsmae.methods import METHODS
from xsmae.ranges import check_numbers
from xsmae.trainer import create_schedule

BATCH_SIZE = 256  # at most
VIEW_SIZE = 128  # pixels, at most
PATCH_SIZES = (16, 8)
MIN_GRID = 6  # patches a side with the larger patch size
SHAPES = 64  # images whose size is looked at, evenly spaced
MEASURED = 256  # images that mean and std are measured on, evenly spaced
SMALLEST_STD = 1 / 255  # images of one colour have none

# Field -> how many times in a run, and the fewest and most steps between two of them.
INTERVALS = {
    "log_every": (20, 1, 50),
    "checkpoint.every": (5, 10, 1000),
    "figures.every": (4, 10, 5000),
    "knn.every": (4, 10, 5000),
}
WARMUP = ("optim.warmup_steps", "optim.warmup_epochs")
WARMUP_SHARE = 10  # of the run: a tenth

Chosen = tuple[dict[str, Any], str]  # values by field, and why


def settle(
    config: ml_collections.ConfigDict,
    source: Source | None,
    *,
    workdir: Path | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with all of `FIELDS` set, and lines that say what was chosen.

    source: None if there is no data yet; then values are assumed, and intervals that
    need the length stay None. workdir: a run that resumes there keeps its values.
    devices: what the run is for; None: those of this machine.
    """
    check_numbers(flatten(config.to_dict()), RANGES)
    config = copy.deepcopy(config)
    devices = jax.devices() if devices is None else devices
    lines = []
    saved = _saved(workdir)
    kept = {n: saved[n] for n in _unset(config, FIELDS) if saved.get(n) is not None}
    if kept:
        _set(config, kept)
        lines.append(f"as this run began: {_shown(kept)}")
    chosen = []
    for names, rule in RULES:
        unset = _unset(config, names)
        values, reason = rule(config, source, devices) if unset else ({}, "")
        values = {name: values[name] for name in unset if name in values}
        if values:
            _set(config, values)
            chosen.append(f"  {_shown(values)}  ({reason})")
    if source is None and not config.model.reference_gsd:
        _set(config, {"model.reference_gsd": 1.0})
        chosen.append("  model.reference_gsd=1.0  (assumed, there is no GSD yet)")
    if chosen:
        lines += ["chosen, each can be set by --config.FIELD=VALUE:", *chosen]
    return config, lines


def fit_warmup(
    config: ml_collections.ConfigDict,
    given: Collection[str],
    *,
    workdir: Path | None = None,
) -> list[str]:
    """Shorten the config's own warm-up to a tenth of a run whose length the user set.

    given: the fields that the user set, dotted. A warm-up among them stays as it is. A
    run that resumes in `workdir` keeps its warm-up. Returns a line if anything changed.
    """
    if set(WARMUP) & set(given) or not {"num_steps", "num_epochs"} & set(given):
        return []
    optim, steps, epochs = config.optim, config.num_steps, config.num_epochs
    if steps is not None:
        # How many steps the config's epochs are is known once there is data.
        longest = steps // WARMUP_SHARE
        if optim.warmup_steps is not None:
            longest = min(optim.warmup_steps, longest)
        change, of = {"optim.warmup_steps": longest}, f"num_steps={steps}"
    elif optim.warmup_steps is None:
        longest = min(optim.warmup_epochs, epochs / WARMUP_SHARE)
        change, of = {"optim.warmup_epochs": longest}, f"num_epochs={epochs:g}"
    else:
        return []
    before = flatten(config.to_dict())
    saved = _saved(workdir)
    change = {name: saved.get(name, value) for name, value in change.items()}
    if all(before[name] == value for name, value in change.items()):
        return []
    _set(config, change)
    return [f"{_shown(change)}: at most a tenth of {of}, since no warm-up was set"]


def _batch_size(config, source, devices) -> Chosen:
    if source is None:
        return {"batch_size": BATCH_SIZE}, "assumed, there are no images yet"
    count = len(source)
    size = min(BATCH_SIZE, 1 << max(count.bit_length() - 1, 0))
    unit = len(devices) * config.optim.accumulation_steps
    size = max(size // unit, 1) * unit
    return {"batch_size": size}, f"{count} images on {len(devices)} device(s)"


def _dtype(config, source, devices) -> Chosen:
    device = devices[0]
    name = " ".join(dict.fromkeys((device.platform, device.device_kind)))
    capability = getattr(device, "compute_capability", None)
    if device.platform == "cpu":
        return {"model.dtype": "float32"}, "CPUs are slower in bfloat16"
    if capability is not None and float(capability) < 8:
        return {"model.dtype": "float32"}, f"{name} has no bfloat16"
    return {"model.dtype": "bfloat16"}, name


def _view_size(config, source, devices) -> Chosen:
    side, reason = None, "assumed, there are no images yet"
    if source is not None:
        side = int(np.median([min(shape) for shape in image_shapes(source)]))
        reason = f"images of {side} px, the median of their shorter sides"
    limit = VIEW_SIZE
    if side is not None and config.method in METHODS:
        # A method may predict a larger crop than it reads.
        limit = min(limit, side // METHODS[config.method].target_scale(config.model))
    size, patch = config.views.size, config.model.patch_size
    if patch is None:
        larger, smaller = PATCH_SIZES
        fits = (size or limit) >= MIN_GRID * larger and (size or 0) % larger == 0
        patch = larger if fits else smaller
    if size is None:
        size = max(limit // patch, 1) * patch
    return {"views.size": size, "model.patch_size": patch}, reason


def _statistics(config, source, devices) -> Chosen:
    if source is None:
        return dict(zip(("mean", "std"), IMAGENET, strict=True)), (
            "ImageNet's, there are no images yet"
        )
    indices = evenly_spaced(len(source), MEASURED)
    found = survey(source, indices=indices)
    if not found.images:
        name, reason = next(iter(found.rejected.items()))
        raise UserError(
            f"mean and std cannot be measured: none of {len(indices)} images can be "
            f"read, the first {name}: {reason}"
        )
    mean, std = found.statistics()
    values = {
        "mean": tuple(round(value, 4) for value in mean),
        "std": tuple(round(max(value, SMALLEST_STD), 4) for value in std),
    }
    return values, f"measured on {len(found.images)} of {len(source)} images"


def _intervals(config, source, devices) -> Chosen:
    if source is None and config.num_steps is None:
        return {}, "the length is not known yet"
    steps = config.num_steps
    if source is not None:
        steps = create_schedule(config, num_images=len(source)).num_steps
    values = {
        name: min(max(steps // times, low), high)
        for name, (times, low, high) in INTERVALS.items()
    }
    return values, f"{steps} steps"


RULES = (
    (("batch_size",), _batch_size),
    (("model.dtype",), _dtype),
    (("views.size", "model.patch_size"), _view_size),
    (("mean", "std"), _statistics),
    (tuple(INTERVALS), _intervals),
)
FIELDS = tuple(name for names, _ in RULES for name in names)


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of `total` positions, the same each time."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def image_shapes(source: Source) -> list[tuple[int, int]]:
    """Height and width of images of a source, of files without decoding them.

    Raises UserError if none can be opened.
    """
    shapes, indices = [], evenly_spaced(len(source), SHAPES)
    for index in indices:
        try:
            with source.open(index) as record:
                shapes.append(record.image.shape[:2])
        except BadImageError as error:
            reason = error
    if not shapes:
        raise UserError(
            f"none of {len(indices)} images of {source!r} can be opened, the last: "
            f"{reason}"
        )
    return shapes


def _saved(workdir: Path | None) -> dict[str, Any]:
    """The fields of the run that resumes in `workdir`; {} if none does."""
    if workdir is None or not has_checkpoint(workdir):
        return {}
    try:
        saved = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # what is wrong with it is said when the workdir is opened
    return flatten(saved) if isinstance(saved, dict) else {}


def _unset(config: ml_collections.ConfigDict, names: Collection[str]) -> list[str]:
    flat = flatten(config.to_dict())
    return [name for name in names if flat.get(name) is None]


def _set(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    config.update_from_flattened_dict(tuples)


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"'({','.join(map(str, value))})'"
    return str(value)
