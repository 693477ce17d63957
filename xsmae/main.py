"""Pretraining: `python -m xsmae.main --config=configs/fmow.py --workdir=DIR`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

import xsmae.configs
from xsmae.errors import UserError, memory_shortage

# Config files that come with the package are found by their name from any folder.
INSTALLED_CONFIGS = Path(xsmae.configs.__file__).parent
LESS_MEMORY = (
    "lower --config.batch_size, compute it in parts with "
    "--config.optim.accumulation_steps, or give --config.model.remat=full"
)


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


def define_flags(flag_values: flags.FlagValues) -> None:
    """The flags of pretraining."""
    define_config(flag_values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run's files go, and where it goes on from. Default: runs/, then the "
        "config's name and argument.",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "hosts",
        False,
        "This is one of several processes, which Slurm, Open MPI, GKE or Cloud TPU "
        "tell of each other.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Where nothing does: HOST:PORT of process 0, the same for all.",
        flag_values=flag_values,
    )
    for name, text in (
        ("num_processes", "How many there are."),
        ("process_id", "Which of them this is, from 0."),
    ):
        flags.DEFINE_integer(
            name, None, f"With --coordinator. {text}", flag_values=flag_values
        )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Build everything, print parameters, memory, steps and shapes, train nothing.",
        flag_values=flag_values,
    )


def default_workdir(argv: list[str]) -> Path:
    """`--config=configs/fmow.py:mae,size=large` -> `runs/fmow-mae-size-large`."""
    flag = next(a for a in _joined(argv) if a.lstrip("-").startswith("config="))
    path, _, argument = flag.partition("=")[2].partition(":")
    parts = [Path(path).stem, *argument.replace("=", "-").split(",")]
    return Path("runs") / "-".join(filter(None, parts))


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
    argv: list[str], define: Callable[[flags.FlagValues], None] = define_flags
) -> flags.FlagValues:
    """The flags of `argv`, which `define` defines.

    Raises UserError, in one line, for what is wrong in them.
    """
    values = flags.FlagValues()
    define(values)
    argv = find_config(_joined(argv))
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


def _joined(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`."""
    argv = list(argv)
    if "--config" in argv[:-1]:
        at = argv.index("--config")
        argv[at : at + 2] = [f"--config={argv[at + 1]}"]
    return argv


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "--helpfull"} & set(argv):
        values = flags.FlagValues()
        define_flags(values)
        print(__doc__, values.main_module_help() or values.get_help(), sep="\n\n")
        return 0
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of errors
    try:
        values = parse(argv)
        # After the flags, so that a wrong one is told at once.
        from xsmae import hosts, init, report, train

        hosts.join(values, watchdog_minutes=values.config.watchdog_minutes)
        workdir = Path(values.workdir or default_workdir(argv))
        if values.config.init:
            given = given_fields(argv)
            for change in init.adopt(values.config, given, workdir=workdir):
                print(f"as the weights have it: {change}")
        if values.dry_run:
            with memory_shortage(LESS_MEMORY):
                print(report.dry_run(values.config))
            return 0
        with hosts.ends_with_the_others(), memory_shortage(LESS_MEMORY):
            return train.train_and_evaluate(values.config, workdir)
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("xsmae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
