"""Chooses unset settings by the data, the device and the length of a run.

A field of `FIELDS` is chosen if it is None in the config, and the mean and std of bands
that the weights in `config.init` lack. The choice is written to the run's `config.json`
at its start. A resumed run reads it from there and chooses nothing
again, even if the device or the data have changed.
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

from xsmae.bands import BANDS, UNITS
from xsmae.checkpoints.store import has_checkpoint
from xsmae.config import flatten, ranges_of
from xsmae.configs.common import IMAGENET
from xsmae.data.records import Source
from xsmae.data.survey import settings_of, survey
from xsmae.errors import BadImageError, UserError
from xsmae.methods import METHODS
from xsmae.ranges import check_numbers
from xsmae.trainer import create_schedule

BATCH_SIZE = 256  # maximum
VIEW_SIZE = 128  # pixels, maximum
PATCH_SIZES = (16, 8)
MIN_GRID = 6  # patches per side for the larger patch size
SHAPES = 64  # evenly spaced images that are opened to find the usual size
MEASURED = 256  # evenly spaced images for measuring mean and std

# Field -> (times per run, minimum interval in steps, maximum interval in steps).
INTERVALS = {
    "log_every": (20, 1, 50),
    "checkpoint.every": (5, 10, 1000),
    "figures.every": (4, 10, 5000),
    "knn.every": (4, 10, 5000),
}
WARMUP = ("optim.warmup_steps", "optim.warmup_epochs")
WARMUP_SHARE = 10  # the warm-up is at most 1 / WARMUP_SHARE of the run

Chosen = tuple[dict[str, Any], str]  # field -> value, and the reason


def settle(
    config: ml_collections.ConfigDict,
    source: Source | None,
    *,
    workdir: Path | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with all `FIELDS` set, and lines that list the choices.

    source: None if there is no data yet; then values are assumed, and intervals that
    need the run's length stay None. workdir: a run that resumes there keeps its values.
    devices: of the run; None means those of this machine.
    """
    check_numbers(flatten(config.to_dict()), ranges_of(config))
    config = copy.deepcopy(config)
    devices = jax.devices() if devices is None else devices
    lines = []
    saved = _saved(workdir)
    kept = {n: saved[n] for n in _unset(config, FIELDS) if saved.get(n) is not None}
    if kept:
        _set(config, kept)
        lines.append(f"kept from the start of this run: {_shown(kept)}")
    chosen = []
    for names, rule in RULES:
        unset = _unset(config, names)
        values, reason = rule(config, source, devices) if unset else ({}, "")
        values = {n: _filled(config, n, values[n]) for n in unset if n in values}
        if values:
            _set(config, values)
            chosen.append(f"  {_shown(values)}  ({reason})")
    if source is None and not config.model.reference_gsd:
        _set(config, {"model.reference_gsd": 1.0})
        chosen.append("  model.reference_gsd=1.0  (assumed, no GSD is known yet)")
    if chosen:
        lines += ["chosen (set any with --config.FIELD=VALUE):", *chosen]
    return config, lines


def fit_warmup(
    config: ml_collections.ConfigDict,
    given: Collection[str],
    *,
    workdir: Path | None = None,
) -> list[str]:
    """Limit the warm-up to 10 % of the run if the user set only the run's length.

    given: the fields that the user set, dotted. A warm-up that the user set stays. A
    run that resumes in `workdir` keeps its warm-up. Returns a line if anything changed.
    """
    if set(WARMUP) & set(given) or not {"num_steps", "num_epochs"} & set(given):
        return []
    optim, steps, epochs = config.optim, config.num_steps, config.num_epochs
    if steps is not None:
        # Without data, the config's warm-up epochs cannot be converted to steps.
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
    return [f"{_shown(change)}: at most 10 % of {of}, because no warm-up was set"]


def _batch_size(config, source, devices) -> Chosen:
    if source is None:
        return {"batch_size": BATCH_SIZE}, "assumed, no images are known yet"
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
    side, reason = None, "assumed, no images are known yet"
    if source is not None:
        side = int(np.median([min(shape) for shape in image_shapes(source)]))
        reason = f"images have {side} px, the median of their shorter sides"
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


def _bands(config, source, devices) -> Chosen:
    if source is None:
        return {"bands": BANDS}, "assumed, there are no images yet"
    return {"bands": source.bands}, "those of the images"


def _values(config, source, devices) -> Chosen:
    if source is None:
        return {"dtype": "uint8", "units": UNITS}, "assumed, there are no images yet"
    values = {"dtype": source.dtype, "units": source.units}
    return values, "the values of the images"


def _wavelengths(config, source, devices) -> Chosen:
    if source is None:
        return {"wavelengths": ()}, "assumed, there are no images yet"
    return {"wavelengths": source.wavelengths}, "nm, those of the sensor's preset"


def _statistics(config, source, devices) -> Chosen:
    if source is None:
        if len(config.bands) == len(BANDS):
            values, reason = IMAGENET, "ImageNet's, no images are known yet"
        else:
            values = (0.0,) * len(config.bands), (1.0,) * len(config.bands)
            reason = "assumed, no images are known yet"
        return dict(zip(("mean", "std"), values, strict=True)), reason
    indices = evenly_spaced(len(source), MEASURED)
    found = survey(source, indices=indices)
    if not found.counted():
        nothing = source.id(indices[0]), "no pixel has a value"
        name, reason = next(iter(found.rejected.items()), nothing)
        raise UserError(
            f"mean and std cannot be measured: none of {len(indices)} images can be "
            f"read, e.g. {name} ({reason}): give other images, or --config.mean and "
            "--config.std"
        )
    values = settings_of(*found.statistics(), source.dtype)
    return values, f"measured on {len(found.images)} of {len(source)} images"


def _intervals(config, source, devices) -> Chosen:
    if source is None and config.num_steps is None:
        return {}, "the length is unknown"
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
    (("bands",), _bands),
    (("dtype", "units"), _values),
    (("wavelengths",), _wavelengths),
    (("mean", "std"), _statistics),
    (tuple(INTERVALS), _intervals),
)
FIELDS = tuple(name for names, _ in RULES for name in names)


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of `total` positions, always the same."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def image_shapes(source: Source) -> list[tuple[int, int]]:
    """Height and width of some images of a source; files are not decoded.

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
            f"none of {len(indices)} images of {source!r} can be opened, e.g. the last "
            f"({reason}): give other images"
        )
    return shapes


def _saved(workdir: Path | None) -> dict[str, Any]:
    """The config fields of the run that resumes in `workdir`; {} if there is none."""
    if workdir is None or not has_checkpoint(workdir):
        return {}
    try:
        saved = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # opening the workdir reports what is wrong with it
    return flatten(saved) if isinstance(saved, dict) else {}


def _unset(config: ml_collections.ConfigDict, names: Collection[str]) -> list[str]:
    flat = flatten(config.to_dict())
    # A config of 8-bit images has no `units`, so there is nothing to choose.
    return [n for n in names if n in flat and (flat[n] is None or _is_partial(n, flat))]


def _is_partial(name: str, flat: Mapping[str, Any]) -> bool:
    """True if weights gave the mean or std of some bands, and None for the others."""
    return name in ("mean", "std") and None in flat[name]


def _filled(config: ml_collections.ConfigDict, name: str, value: Any) -> Any:
    """The chosen value; of a partial mean or std, only the missing numbers."""
    flat = flatten(config.to_dict())
    if flat[name] is None:
        return value
    pairs = zip(flat[name], value, strict=True)
    return tuple(new if old is None else old for old, new in pairs)


def _set(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    config.update_from_flattened_dict(tuples)


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"'({','.join(map(str, value))})'"
    return str(value)
