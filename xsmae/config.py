"""Finds and loads configs, changes their fields and checks their numbers."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from xsmae.data.photometric import CHANGES
from xsmae.errors import UserError, of_flags
from xsmae.ranges import BELOW_1, LARGE, SMALL, Ranges, check_numbers

# Field -> smallest and largest value; for a tuple they limit each number. Fields that
# are not set, or that the method lacks, are skipped. The code that reads views, losses
# and networks checks the rest.
RANGES = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, LARGE),
    "num_epochs": (SMALL, LARGE),
    "num_steps": (1, LARGE),
    "log_every": (1, LARGE),
    "mean": (0, 1),
    "std": (SMALL, 1),
    "figures.every": (0, LARGE),
    "figures.samples": (1, LARGE),
    "input.num_workers": (0, LARGE),
    "input.num_threads": (0, LARGE),
    "input.prefetch": (1, LARGE),
    "input.max_rejected_fraction": (0, 1),
    "checkpoint.keep": (1, LARGE),
    "checkpoint.every": (1, LARGE),
    "checkpoint.keep_every": (0, LARGE),
    "checkpoint.keep_going_without_checkpoints": (0, LARGE),
    "watchdog_minutes": (0, LARGE),
    "profile": (1, LARGE),
    "knn.every": (-1, LARGE),
    "knn.k": (1, LARGE),
    "knn.batch_size": (1, LARGE),
    "knn.temperature": (SMALL, LARGE),
    "knn.max_train": (0, LARGE),
    "knn.max_test": (0, LARGE),
    "optim.max_nonfinite": (1, LARGE),
    "optim.learning_rate": (0, LARGE),
    "optim.learning_rate_batch": (1, LARGE),
    "optim.warmup_epochs": (0, LARGE),
    "optim.warmup_steps": (0, LARGE),
    "optim.weight_decay": (0, LARGE),
    "optim.b1": (0, BELOW_1),
    "optim.b2": (0, BELOW_1),
    "optim.clip_norm": (0, LARGE),
    "optim.accumulation_steps": (1, LARGE),
    "views.size": (1, LARGE),
    "views.area": (SMALL, 1),
    "views.ratio": (SMALL, LARGE),
    "views.horizontal_flip": (0, 1),
    "views.vertical_flip": (0, 1),
    **{f"views.{name}": (0, 1) for name in CHANGES},
    "views.photometric_ramp": (0, LARGE),
    "model.patch_size": (1, LARGE),
    "model.embed_dim": (4, LARGE),
    "model.depth": (1, LARGE),
    "model.num_heads": (1, LARGE),
    "model.mlp_ratio": (SMALL, LARGE),
    "model.decoder_embed_dim": (4, LARGE),
    "model.decoder_depth": (1, LARGE),
    "model.decoder_num_heads": (1, LARGE),
    "model.mask_ratio": (SMALL, BELOW_1),
    "model.norm_epsilon": (0, 1),
    "model.reference_gsd": (SMALL, LARGE),
}


def ranges_of(config: ml_collections.ConfigDict) -> Ranges:
    """`RANGES`; float32 images have a mean and std in their own units.

    A dtype that is not chosen yet may become float32.
    """
    if config.get("dtype", "uint8") == "uint8":
        return RANGES
    return {**RANGES, "mean": (-LARGE, LARGE), "std": (SMALL, LARGE)}


DTYPES = ("float32", "bfloat16")  # for matrix products; parameters are float32


def check_ranges(
    config: ml_collections.ConfigDict, devices: int, *, of_method: Ranges
) -> None:
    """Raises UserError for numbers that are out of range or do not fit together.

    of_method: the ranges of the method's own fields, `Method.ranges`.
    """
    flat = flatten(config.to_dict())
    check_numbers(flat, {**ranges_of(config), **of_method})
    profile = tuple(config.get("profile", ()))  # missing in configs of older runs
    whole = all(isinstance(step, int) for step in profile)
    if len(profile) not in (0, 2) or not whole or list(profile) != sorted(profile):
        raise UserError(
            f"profile={profile}, expected the first and the last step, such as "
            "(10, 15), or () for no profile"
        )
    model, views = config.model, config.views
    if views.size % model.patch_size:
        raise UserError(
            f"views.size={views.size} is not a multiple of model.patch_size="
            f"{model.patch_size}: change one of them"
        )
    if model.dtype not in DTYPES:
        raise UserError(
            f"model.dtype={model.dtype}, expected one of {', '.join(DTYPES)}"
        )
    for part in ("", "decoder_"):
        if f"{part}embed_dim" not in model:
            continue  # a method without a decoder
        width, heads = model[f"{part}embed_dim"], model[f"{part}num_heads"]
        if width % heads:
            raise UserError(
                f"model.{part}embed_dim={width} is not a multiple of model.{part}"
                f"num_heads={heads}: change one of them"
            )
    parts = config.optim.accumulation_steps
    if config.batch_size % (parts * devices):
        raise UserError(
            f"batch_size={config.batch_size}, expected a multiple of "
            f"optim.accumulation_steps={parts} times {devices} device(s): change one"
        )
    groups = flat.get("loss.contrastive.groups", 1)
    if config.batch_size // parts % groups:
        raise UserError(
            f"batch_size={config.batch_size} in {parts} part(s), expected a multiple "
            f"of loss.contrastive.groups={groups} in each part: change one"
        )
    if model.position == "gsd" and not model.reference_gsd:
        raise UserError(
            "model.reference_gsd is not set: give the GSD that patch positions refer "
            "to, about the usual GSD of the images, with "
            "--config.model.reference_gsd=METRES"
        )
    if not any(term["weight"] for term in config.loss.to_dict().values()):
        raise UserError(
            f"every weight in config.loss is 0 ({', '.join(config.loss)}), so nothing "
            "would be learned: set one above 0"
        )
    for name in ("mean", "std"):
        if len(config[name]) != len(config.bands):
            raise UserError(
                f"{name}={config[name]} has {len(config[name])} values, expected "
                f"{len(config.bands)}, one per band in bands={', '.join(config.bands)}:"
                " change one of them"
            )


# Fields that change how the network runs, but its numbers only by rounding.
EXECUTION_FIELDS = ("model.attention", "model.remat", "model.scan")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one dict with dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Installed config files are found by name from any folder.
INSTALLED_CONFIGS = Path(importlib.util.find_spec("xsmae.configs").origin).parent


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads a config and changes some of its fields.

    name: `folder` or `configs/folder.py` for an installed config, or the path of any
    config file. An argument follows a colon, as in `fmow:mae,size=large`. overrides:
    dotted field -> value, as in {"data.root": "images", "num_steps": 5}. Strings are
    parsed as on the command line; None clears a field that may be empty. Raises
    UserError for an unknown config, argument or field, and for a value of another type.
    """
    config = read_config(name, f"config {name!r}")
    overrides = flatten(dict(overrides or {}))
    for field, value in overrides.items():
        told = f"{field}={value!r}"
        group, last = _owner(config, field, told)
        if value is None:
            if not isinstance(_references(group).get(last), FieldReference):
                raise UserError(f"{told}: the field may not be empty; give a value")
            group[last] = None
        elif group.get_type(last) is str and not isinstance(value, str | os.PathLike):
            raise UserError(f"{told}, expected a string")
    given = [f"--config.{n}={_text(v)}" for n, v in overrides.items() if v is not None]
    try:
        return override(config, given, "config")
    except UserError as error:
        raise UserError(str(error).replace("--config.", "")) from None


def _references(group: ConfigDict) -> dict[str, Any]:
    """The fields of a group; fields that may be empty are FieldReferences."""
    return dict(group.items(preserve_field_references=True))


def _text(value: Any) -> str:
    """A value as written on the command line."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return repr(_plain(value))


def _plain(value: Any) -> Any:
    """Converts lists to tuples, and NumPy numbers to Python numbers."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def read_config(name: str, told: str) -> ConfigDict:
    """The config that the file `name` returns, locked against new fields.

    told: its name in messages, such as `--config=folder`. Raises a one-line UserError
    for a wrong argument, and for an error in the file, with its line number.
    """
    path, argument = find_config(name, told)
    loader = SourceFileLoader("xsmae_config", str(path))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader)
    )
    try:
        loader.exec_module(module)
        config = module.get_config(*argument)
    except UserError as error:
        raise UserError(f"{told}: {error}") from None
    except Exception as error:
        raise UserError(f"{told}: {_place(error, path)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{told}: get_config returned a {type(config).__name__}, expected a "
            "ConfigDict: start from xsmae.configs.common.get_common"
        )
    return config.lock()


def _place(error: Exception, path: Path) -> str:
    """The line of a config file that raised an error, and the error."""
    what = f"{type(error).__name__}: {error}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        path, lines = error.filename, [error.lineno]
        what = f"{type(error).__name__}: {error.msg}"
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    return " ".join(f"{place}: {what}".split())


def find_config(name: str, told: str) -> tuple[Path, list[str]]:
    """The file of a config, and the argument after the colon, if there is one.

    `folder` means configs/folder.py. If the file does not exist here, the installed
    file of that name is used.
    """
    name, colon, argument = name.partition(":")
    first, comma, others = name.partition(",")
    if comma and not Path(name).exists():
        raise UserError(f"{told}: a colon ends the name, expected {first}:{others}")
    path = Path(name)
    if not path.is_file() and path.suffix != ".py":
        path = Path("configs" if path.name == name else "", f"{name}.py")
    known = {p.name for p in INSTALLED_CONFIGS.glob("[a-z]*.py")} - {"common.py"}
    ours = path.parent in (Path(), Path("configs"))
    if not path.is_file() or (ours and path.name == "common.py"):
        if not ours or path.name not in known:
            listed = ", ".join(f"configs/{n}" for n in sorted(known))
            raise UserError(
                f"{told}: there is no config {path}{_nearest(path.name, known)}; "
                f"expected a config file or one of {listed}"
            )
        path = INSTALLED_CONFIGS / path.name
    return path, [argument] if colon else []


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def override(config: ConfigDict, given: Sequence[str], name: str) -> ConfigDict:
    """Applies the arguments --NAME.FIELD=VALUE in `given` to `config`; returns it.

    Raises UserError for an unknown field and for a value of another type.
    """
    for argument in given:
        field = argument.partition("=")[0].partition(".")[2]
        if (name, field) == ("config", "method"):
            method = argument.partition("=")[2] or "METHOD"
            raise UserError(
                f"{argument}: the method decides which fields exist, so give it with "
                f"the config's name: --config=NAME:method={method}"
            )
        _owner(config, field, argument)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            name,
            config,
            flag_values=values,
            lock_config=False,
            sys_argv=["xsmae", *given],
        )
        rest = values(["xsmae", *given])[1:]
    except (LookupError, AttributeError) as error:
        raise UserError(f"{', '.join(given)}: {' '.join(str(error).split())}") from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(of_flags(error)) from None
    if rest:
        raise UserError(f"unknown arguments: {' '.join(rest)}")
    return config


def _owner(config: ConfigDict, field: str, told: str) -> tuple[ConfigDict, str]:
    """The group that contains a dotted field, and the field's name in the group."""
    names = re.sub(r"\[.*?\]", "", field).split(".")
    owner = config
    for depth, name in enumerate(names, 1):
        if not isinstance(owner, ConfigDict):
            raise UserError(
                f"{told}: there is no such field, "
                f"{'.'.join(names[: depth - 1])} is a value and has no fields"
            )
        if name not in owner:
            raise UserError(
                f"{told}: there is no such field{_nearest(name, owner)}, expected one "
                f"of {', '.join(sorted(owner))}"
            )
        if depth < len(names):
            owner = owner[name]
    return owner, name
