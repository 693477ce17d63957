"""Pretraining: `python -m xsmae.main --config=configs/fmow.py --workdir=DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags, logging

from xsmae.config import define_config, given_fields, joined, parse
from xsmae.errors import UserError, memory_shortage

LESS_MEMORY = (
    "lower --config.batch_size, compute it in parts with "
    "--config.optim.accumulation_steps, or give --config.model.remat=full"
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
    flag = next(
        a for a in joined(argv, "config") if a.lstrip("-").startswith("config=")
    )
    path, _, argument = flag.partition("=")[2].partition(":")
    parts = [Path(path).stem, *argument.replace("=", "-").split(",")]
    return Path("runs") / "-".join(filter(None, parts))


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
        values = parse(argv, define_flags)
        # After the flags, so that a wrong one is told at once.
        from xsmae import train
        from xsmae.run import hosts, report
        from xsmae.weights import warm_start as init

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
