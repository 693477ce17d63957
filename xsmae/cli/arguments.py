"""Parses a command's arguments: flags, the config and its fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from absl import flags

from xsmae.config import override, read_config
from xsmae.errors import UserError, of_flags


def parse_flags(
    values: flags.FlagValues, argv: Sequence[str], *, files: bool = False
) -> list[str]:
    """Set `values` from `argv`; returns the arguments that are not flags.

    files: True if there may be such arguments. Raises a one-line UserError.
    """
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        other = _other_prefix(error.flagname)
        hint = f"; did you mean --{other}?" if other else ""
        raise UserError(f"{of_flags(error)}{hint}") from None
    except flags.Error as error:
        raise UserError(of_flags(error)) from None
    if rest and not files:
        raise UserError(
            f"unknown arguments {' '.join(rest)}, expected --FLAG=VALUE: see --help"
        )
    return rest


def _other_prefix(flag: str) -> str:
    """The other spelling of a field of the data, with and without `config.`."""
    if flag.startswith("data."):
        return f"config.{flag}"
    return flag.removeprefix("config.") if flag.startswith("config.data.") else ""


def define_config(flag_values: flags.FlagValues) -> None:
    """Define the flag --config."""
    flags.DEFINE_string(
        "config",
        None,
        "The config of the run, NAME[:ARGUMENT], such as folder or configs/folder.py. "
        "ARGUMENT is [preset][,method=METHOD][,size=SIZE][,decoder=DECODER]. "
        "--config.FIELD=VALUE sets a field; configs/common.py lists all fields.",
        flag_values=flag_values,
    )


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    *,
    example: str = "xsmae pretrain --config=configs/quickstart.py",
) -> flags.FlagValues:
    """Parse `argv` with the flags of `define`; `config` becomes the config itself.

    example: the command shown if --config is missing. Raises a one-line UserError.
    """
    values = flags.FlagValues()
    define(values)
    fields, rest = split_fields(argv, ["config"])
    parse_flags(values, rest)
    if values.config is None:
        raise UserError(f"--config=NAME is missing: {example}")
    config = read_config(values.config, f"--config={values.config}")
    values["config"].value = override(config, fields["config"], "config")
    return values


def given_fields(argv: list[str]) -> list[str]:
    """The dotted names of the config fields that the command sets."""
    flag = re.compile(r"--?config\.([\w.]+)")
    return [m[1] for m in map(flag.match, argv) if m]


def joined(argv: list[str], name: str) -> list[str]:
    """`argv` with `--name VALUE` rewritten as `--name=VALUE`."""
    result, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in (f"--{name}", f"-{name}") and rest:
            argument = f"{argument}={rest.pop(0)}"
        result.append(argument)
    return result


def split_fields(
    argv: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """NAME -> its arguments --NAME.FIELD=VALUE, for `names`; and all others."""
    fields, others = {name: [] for name in names}, []
    pattern = re.compile(rf"--?(no)?({'|'.join(names)})[.]")
    left = list(argv)
    while left:
        argument = left.pop(0)
        found = pattern.match(argument)
        if found is None:
            others.append(argument)
            continue
        # The value may be the next argument, unless that is a flag; "-1" is a value.
        apart = left and re.match(r"(?!-)|-[\d.]", left[0])
        if "=" not in argument and not found[1] and apart:
            argument = f"{argument}={left.pop(0)}"
        fields[found[2]].append(argument)
    return fields, others
