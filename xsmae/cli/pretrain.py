"""xsmae pretrain --config=quickstart --workdir=runs/quickstart

Pretrains an encoder by the config, and measures it on the way. If the run has stopped,
the same command resumes it from the newest checkpoint in --workdir.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from xsmae.cli.arguments import define_config, given_fields, joined, parse
from xsmae.cli.command import example, run
from xsmae.errors import memory_shortage
from xsmae.process.log import LOG

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
        "The folder of the run's files; the run resumes from it. Default: runs/, then "
        "the config's name and argument.",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "hosts",
        False,
        "This is one of several processes started by Slurm, Open MPI, GKE or Cloud "
        "TPU.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Instead of --hosts: HOST:PORT of process 0, the same for all processes.",
        flag_values=flag_values,
    )
    for name, text in (
        ("num_processes", "How many processes there are."),
        ("process_id", "Which of them this one is, from 0."),
    ):
        flags.DEFINE_integer(
            name, None, f"With --coordinator. {text}", flag_values=flag_values
        )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Build everything, print parameters, memory, steps and shapes, but do not "
        "train.",
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


def pretrain(argv: list[str]) -> int:
    """Train; returns the exit status."""
    values = parse(argv, define_flags, example=example(__doc__))
    # Imported after parsing, so that a wrong flag fails at once.
    from xsmae import train
    from xsmae.run import choices, hosts, report
    from xsmae.weights import warm_start as init

    hosts.join(values, watchdog_minutes=values.config.watchdog_minutes)
    workdir = Path(values.workdir or default_workdir(argv))
    given = given_fields(argv)
    if values.config.init:
        for change in init.adopt(values.config, given, workdir=workdir):
            LOG.info(f"taken from the weights: {change}")
    for line in choices.fit_warmup(values.config, given, workdir=workdir):
        LOG.info(line)
    if values.dry_run:
        LOG.info(report.dry_run(values.config))
        return 0
    # Catch it here, so that too little memory ends all processes of a run.
    with hosts.ends_with_the_others(), memory_shortage(LESS_MEMORY):
        return train.train_and_evaluate(values.config, workdir)


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae pretrain`; returns the exit status."""
    return run(
        pretrain,
        argv,
        doc=__doc__,
        sections={"Flags": define_flags},
        less_memory=LESS_MEMORY,
    )
