"""Weights from and to other frameworks.

python -m xsmae.convert import --source=FILE.pth --out=DIR
    reads an official checkpoint of Cross-Scale MAE, MAE, SatMAE or Scale-MAE (.pth or
    .safetensors), and writes DIR/encoder and a checkpoint for --config.init=DIR.
python -m xsmae.convert export --source=DIR --format=timm|huggingface --out=DIR
    writes the encoder of a run, of an import or of a folder `encoder` as timm's
    VisionTransformer or Hugging Face's ViTModel and ViTMAEModel load it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import jax
from absl import flags, logging
from flax import nnx

from xsmae.errors import UserError
from xsmae.process.signals import StopRequest
from xsmae.weights.export import FORMATS, export
from xsmae.weights.official import OPTIONS, import_checkpoint, write_import
from xsmae.weights.torch_file import read_pytorch

__all__ = ["import_checkpoint", "main", "read_pytorch", "write_import"]

COMMANDS = ("import", "export")


def define_flags(values: flags.FlagValues, command: str) -> None:
    """The flags of one of COMMANDS."""

    def text(name, help):
        flags.DEFINE_string(name, None, help, flag_values=values)

    text("out", "A new folder.")
    if command == "export":
        text("source", "A run's workdir, an import, or a folder `encoder`.")
        text("format", f"One of {', '.join(FORMATS)}.")
        flags.DEFINE_float(
            "gsd",
            None,
            "Metres per pixel that GSD-scaled positions are written for.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "image_size",
            None,
            "Pixels that the positions are written for; default: as trained.",
            flag_values=values,
        )
        return
    text("source", "The official checkpoint.")
    for name in OPTIONS:
        text(name, "Where the file does not tell: what the official code calls so.")
    text("bands", "The bands in order, red,green,blue; for other than three.")
    text("mean", "Of the bands in 0-1, as 0.4,0.4,0.4; default: the official ones.")
    text("std", "Likewise.")


def run_import(values: flags.FlagValues) -> str:
    """Import and write; returns what to print."""
    source, out = Path(values.source), Path(values.out)
    options = {name: _literal(name, values[name].value) for name in OPTIONS}
    imported = import_checkpoint(source, **options)
    config = imported.config
    channels = len(config.mean)  # of the file, before the flags
    with config.ignore_type():
        if values.bands:
            config.bands = tuple(values.bands.split(","))
        for name in ("mean", "std"):
            if values[name].value:
                config[name] = _numbers(name, values[name].value)
    if channels != 3 and not (values.bands and values.mean and values.std):
        raise UserError(
            f"{source} is of {channels} bands: name them and say how they were "
            "normalised, with --bands, --mean and --std"
        )
    for name in ("bands", "mean", "std"):
        if len(config[name]) != channels:
            raise UserError(f"--{name} has {len(config[name])}, expected {channels}")
    write_import(imported, out, source=source)
    model, part = config.model, "encoder" if imported.encoder_only else "network"
    count = sum(x.size for x in jax.tree.leaves(nnx.state(imported.network)))
    lines = [
        f"{config.method}, {count / 1e6:.2f} M parameters ({part}): patch size "
        f"{model.patch_size}, width {model.embed_dim}, depth {model.depth}, "
        f"{model.num_heads} heads, {model.norm_style}-norm; images of "
        f"{config.views.size} px, {channels} bands",
        *imported.notes,
        "every other tensor has its place",
        f"encoder: {out / 'encoder'}",
    ]
    if not imported.encoder_only:
        lines.append(f"to pretrain on: --config.init={out}")
    return "\n".join(lines)


def _literal(name: str, text: str | None):
    """A flag's value: a number, a truth, a tuple, or else the text."""
    if text is None:
        return None
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        if name == "method":
            return text
        raise UserError(f"--{name}={text}, expected a number or a list") from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """0.4,0.5 as numbers."""
    try:
        return tuple(map(float, text.strip("()[]").rstrip(",").split(",")))
    except ValueError:
        raise UserError(f"--{name}={text}, expected numbers: 0.4,0.4,0.4") from None


def parse(argv: list[str]) -> tuple[str, flags.FlagValues]:
    """The command and its flags; raises UserError for what is wrong in them."""
    if len(argv) < 2 or argv[1] not in COMMANDS:
        found = argv[1] if len(argv) > 1 else "nothing"
        raise UserError(f"{found} given, expected import or export")
    values = flags.FlagValues()
    define_flags(values, argv[1])
    try:
        rest = values([argv[0], *argv[2:]])
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if rest[1:]:
        raise UserError(f"unknown arguments: {' '.join(rest[1:])}")
    for name in ("source", "out", "format"):
        if name in values and not values[name].value:
            raise UserError(f"--{name} is missing")
    out = Path(values.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already: give a new folder")
    return argv[1], values


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(__doc__)
        for command in COMMANDS:
            values = flags.FlagValues()
            define_flags(values, command)
            print(f"{command}:\n{values.get_help()}")
        return 0
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of errors
    try:
        command, values = parse(argv)
        # What is written is written whole: half of it would be refused the next time.
        with StopRequest() as stop:
            if command == "import":
                print(run_import(values))
            else:
                notes = export(
                    values.source,
                    values.out,
                    format=values.format,
                    gsd=values.gsd,
                    image_size=values.image_size,
                )
                print("\n".join([*notes, f"written: {values.out}"]))
        return 0 if stop.signal is None else 128 + stop.signal
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"xsmae: cannot write {error.filename or 'the output'}: {error.strerror}",
            file=sys.stderr,
        )
        return 2
