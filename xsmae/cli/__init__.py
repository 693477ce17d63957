"""The command line: `xsmae COMMAND`, with one file per command."""

from __future__ import annotations

import difflib
import importlib
import sys

from xsmae.cli.command import run
from xsmae.errors import UserError

# Name -> (module here, description for `xsmae --help`).
COMMANDS = {
    "pretrain": ("pretrain", "pretrain an encoder on images"),
    "knn": ("knn", "measure an encoder by its nearest neighbours, over scales"),
    "probe": ("probe", "measure a frozen encoder by a linear classifier"),
    "finetune": ("finetune", "measure an encoder by training all of it with labels"),
    "segment": ("segment", "measure an encoder by segmenting images with masks"),
    "embed": ("embed", "write the features of a folder of images to a Parquet table"),
    "search": ("search", "find the chips of embedded scenes that are alike"),
    "map": ("map", "draw the embeddings of scenes as maps"),
    "predict": ("predict", "map scenes or label images with a trained head"),
    "results": ("results", "make tables and figures of results"),
    "check-data": ("check_data", "check a data set before training on it"),
    "convert": ("convert", "import and export weights of other frameworks"),
    "plan": ("plan", "estimate memory and time of a run on other machines"),
    "verify": ("verify", "check that saved checkpoints are undamaged"),
}


def usage() -> str:
    """The help: one line per command."""
    lines = [f"  {name:12}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "xsmae pretrain --config=quickstart",
            "",
            "Pretrains encoders for remote-sensing images, and measures them.",
            "Usage: xsmae COMMAND [--FLAG=VALUE ...]",
            "",
            *lines,
            "",
            "xsmae COMMAND --help shows an example and lists every flag.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv if argv is None else argv
    name = argv[1] if len(argv) > 1 else "--help"
    if name in COMMANDS:
        module = importlib.import_module(f"xsmae.cli.{COMMANDS[name][0]}")
        return module.main([f"xsmae {name}", *argv[2:]])
    name = "--help" if name == "help" else name
    return run(_refuse, ["xsmae", name], doc=usage(), sections={})


def _refuse(argv: list[str]) -> int:
    name = argv[1]
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {name}: {hint}")
