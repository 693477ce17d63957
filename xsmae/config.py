"""What numbers the fields of a config may have, and which of them belong together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import ConfigDict, config_flags

from xsmae.errors import UserError
from xsmae.ranges import BELOW_1, LARGE, SMALL, Ranges, check_numbers

# Field -> the smallest and the largest; of a tuple, each number. Where a field is not
# set, or the method has none, it is left out. What else is wrong with the views, the
# losses and the networks is said by those that read it.
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


DTYPES = ("float32", "bfloat16")  # of the products; parameters are float32


def check_ranges(
    config: ml_collections.ConfigDict, devices: int, *, of_method: Ranges
) -> None:
    """Raise UserError for numbers out of range, or that do not fit together.

    of_method: the ranges of the method's own fields, `Method.ranges`.
    """
    flat = flatten(config.to_dict())
    check_numbers(flat, {**RANGES, **of_method})
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
        width, heads = model[f"{part}embed_dim"], model[f"{part}num_heads"]
        if width % heads:
            raise UserError(
                f"model.{part}embed_dim={width} is not a multiple of model.{part}"
                f"num_heads={heads}: change one of them"
            )
    parts = config.optim.accumulation_steps
    if config.batch_size % (parts * devices):
        raise UserError(
            f"batch_size={config.batch_size} does not divide into "
            f"optim.accumulation_steps={parts} parts on {devices} device(s)"
        )
    groups = flat.get("loss.contrastive.groups", 1)
    if config.batch_size // parts % groups:
        raise UserError(
            f"batch_size={config.batch_size} in {parts} part(s) does not divide into "
            f"loss.contrastive.groups={groups}"
        )
    if model.position == "gsd" and not model.reference_gsd:
        raise UserError(
            "model.reference_gsd is not set: give the metres per pixel that a patch "
            "index is counted in, about the images' usual GSD, with "
            "--config.model.reference_gsd=METRES"
        )
    if not any(term["weight"] for term in config.loss.to_dict().values()):
        raise UserError(
            f"every weight in config.loss is 0 ({', '.join(config.loss)}): nothing "
            "would be learned; set one above 0"
        )
    for name in ("mean", "std"):
        if len(config[name]) != len(config.bands):
            raise UserError(
                f"{name}={config[name]} has {len(config[name])} values, expected "
                f"{len(config.bands)}, one for each of bands={', '.join(config.bands)}:"
                " change one of them"
            )


# How the network is run: numbers are the same to rounding.
EXECUTION_FIELDS = ("model.attention", "model.remat", "model.scan")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one, with dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Config files that come with the package are found by their name from any folder.
INSTALLED_CONFIGS = Path(importlib.util.find_spec("xsmae.configs").origin).parent


def define_config(flag_values: flags.FlagValues) -> None:
    """The flag of the config."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The run: configs/NAME.py[:preset,method=METHOD,size=SIZE]. Its fields, which "
        "configs/common.py lists, are set by --config.FIELD=VALUE.",
        lock_config=True,
        flag_values=flag_values,
    )


def find_config(argv: list[str], name: str = "config") -> list[str]:
    """`argv` with a config file that is not here replaced by the installed one.

    name: of the flag that takes it.
    """
    found = []
    for argument in argv:
        flag, _, value = argument.partition("=")
        path, colon, rest = value.partition(":")
        installed = INSTALLED_CONFIGS / Path(path).name
        known = {p.name for p in INSTALLED_CONFIGS.glob("[a-z]*.py")} - {"common.py"}
        ours = Path(path).parent in (Path(), Path("configs"))
        if flag.lstrip("-") == name and (
            not Path(path).exists() or (ours and Path(path).name == "common.py")
        ):
            if not ours or Path(path).name not in known:
                raise UserError(
                    f"--{name}={value}: there is no config {path}; those that come "
                    f"with xsmae: {', '.join(f'configs/{n}' for n in sorted(known))}"
                )
            argument = f"{flag}={installed}{colon}{rest}"
        found.append(argument)
    return found


def _in_values(
    argv: list[str], define: Callable[[flags.FlagValues], None]
) -> list[str]:
    """Overrides of a field in what is itself a value, not a group of fields."""
    overrides = [a for a in argv if re.match(r"--?config\.", a)]
    if not overrides:
        return []
    config = parse([a for a in argv if a not in overrides], define).config
    found = []
    for override in overrides:
        group = config
        for name in override.partition("=")[0].split(".")[1:-1]:
            group = group.get(name) if isinstance(group, ConfigDict) else None
        if not isinstance(group, ConfigDict):
            found.append(override)
    return found


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None]
) -> flags.FlagValues:
    """The flags of `argv`, which `define` defines.

    Raises UserError, in one line, for what is wrong in them.
    """
    values = flags.FlagValues()
    define(values)
    argv = find_config(joined(argv, "config"))
    # ml_collections reads the overrides there, whatever it is given.
    before, sys.argv = sys.argv, argv
    try:
        rest = values(argv)
        if rest[1:]:
            raise UserError(f"unknown arguments: {' '.join(rest[1:])}")
        if values.config is None:
            raise UserError("--config=configs/NAME.py is missing")
    except (KeyError, AttributeError) as error:
        # How ml_collections tells of an unknown field; of which, its text says not.
        message = " ".join(str(error.args[0]).split())
        given = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
        given = [a for a in given if a.split(".")[-1] in message]
        if not given:
            raise  # a mistake in the config file itself: where, its traceback tells
        raise UserError(
            f"{' or '.join(given)}: the config has no such field ({message}); "
            "configs/common.py and the config's own file list them"
        ) from None
    except (flags.Error, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, TypeError):
            # Of --config.mesh.fsdp, where mesh is a value, Python's words alone.
            given = _in_values(argv, define)
            if given:
                message = f"{' or '.join(given)}: the config has no such field"
        raise UserError(message) from None
    finally:
        sys.argv = before
    return values


def given_fields(argv: list[str]) -> list[str]:
    """The fields of the config that the command sets, dotted."""
    flag = re.compile(r"--?config\.([\w.]+)")
    return [m[1] for m in map(flag.match, argv) if m]


def joined(argv: list[str], name: str) -> list[str]:
    """`argv` with `--name VALUE` written as `--name=VALUE`."""
    result, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in (f"--{name}", f"-{name}") and rest:
            argument = f"{argument}={rest.pop(0)}"
        result.append(argument)
    return result
