"""xsmae verify runs/quickstart

Reads every checkpoint of a run, given by its workdir or its folder of checkpoints, and
prints for each step whether it is good or what is damaged. The exit status is 1 if a
step is damaged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from xsmae.checkpoints.step import verify as verify_step
from xsmae.checkpoints.store import Checkpoints
from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run
from xsmae.errors import DamagedError, UserError

DAMAGED = 1


def verify(directory: Path) -> bool:
    """Print one line per step; returns True if no step is damaged."""
    inner = directory / "checkpoints"
    checkpoints = Checkpoints(inner if inner.is_dir() else directory, read_only=True)
    steps, whole = checkpoints.steps(), True
    if not steps:
        raise UserError(f"{directory} has no checkpoint: give a run's workdir")
    try:
        for step in steps:
            try:
                checked = verify_step(checkpoints.directory / str(step))
                said = "good" if checked else "saved without digests, not checked"
            except DamagedError as error:
                path = checkpoints.directory / str(step)
                what = str(error).removeprefix(f"{path} is damaged: ")
                said, whole = f"damaged: {what}", False
            print(f"step {step}: {said}", flush=True)
    finally:
        checkpoints.close()
    return whole


def check(argv: list[str]) -> int:
    """Verify the given folder; returns the exit status."""
    folders = parse_flags(flags.FlagValues(), argv, files=True)
    if len(folders) != 1:
        raise UserError(
            f"{len(folders)} folders given, expected one: {example(__doc__)}"
        )
    return 0 if verify(Path(folders[0])) else DAMAGED


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae verify`; returns the exit status."""
    return run(check, argv, doc=__doc__, sections={})


def checkpoints(argv: list[str] | None = None) -> int:
    """`xsmae-checkpoints verify DIR`, the older name of `xsmae verify DIR`."""
    name, *rest = sys.argv if argv is None else argv
    return main([name, *(rest[1:] if rest[:1] == ["verify"] else rest)])
