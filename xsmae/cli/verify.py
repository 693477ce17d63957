"""Are checkpoints as they were saved? `xsmae verify DIR`.

DIR is a workdir or its folder `checkpoints`. A line a step: good, or damaged and which
file or array. Exit status: 0, 1 where a step is damaged, 2 where DIR holds none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import logging

from xsmae.checkpoints.step import verify as verify_step
from xsmae.checkpoints.store import Checkpoints
from xsmae.errors import DamagedError, UserError


def verify(directory: Path) -> bool:
    """Print a line a step; returns whether none is damaged."""
    inner = directory / "checkpoints"
    checkpoints = Checkpoints(inner if inner.is_dir() else directory, read_only=True)
    steps, whole = checkpoints.steps(), True
    if not steps:
        raise UserError(f"{directory} holds no checkpoint: give a run's workdir")
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


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae verify DIR`; returns the exit status."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    logging.set_verbosity(logging.FATAL)  # what is wrong is told in one line
    try:
        if len(argv) != 2:
            raise UserError("expected one folder: xsmae verify DIR")
        return 0 if verify(Path(argv[1])) else 1
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return 2


def checkpoints(argv: list[str] | None = None) -> int:
    """`xsmae-checkpoints verify DIR`, the name of before there was one command."""
    argv = sys.argv if argv is None else argv
    return main([argv[0], *(a for a in argv[1:] if a != "verify")])
