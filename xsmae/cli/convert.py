"""xsmae convert import --source=mae_pretrain_vit_base.pth --out=imports/mae

Reads an official checkpoint of Cross-Scale MAE, MAE, SatMAE or Scale-MAE, and writes
OUT/encoder and a checkpoint for --config.init=OUT. `xsmae convert export --source=RUN
--format=timm --out=DIR` writes an encoder for timm's VisionTransformer, or for Hugging
Face's ViTModel and ViTMAEModel.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import jax
import ml_collections
from absl import flags
from flax import nnx

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run
from xsmae.errors import UserError
from xsmae.process.signals import StopRequest
from xsmae.weights.export import FORMATS, export
from xsmae.weights.importing import read_weights
from xsmae.weights.official import OPTIONS, import_checkpoint, write_import
from xsmae.weights.official_config import PUBLISHED
from xsmae.weights.torch_file import read_pytorch

__all__ = ["import_checkpoint", "main", "read_pytorch", "write_import"]

COMMANDS = ("import", "export")


# Option -> its meaning, with the argument of the official code that set it.
MEANINGS = {
    "method": f"The method: one of {', '.join(PUBLISHED)}. Needed if the file has only "
    "an encoder, because its names do not show the method. Default: mae.",
    "num_heads": "The attention heads of the encoder, num_heads in the official "
    "models. Default: the standard number for its width.",
    "decoder_num_heads": "The attention heads of the decoder, decoder_num_heads in "
    "the official models. Default: the standard number for its width.",
    "image_size": "The height and width of the training images in pixels, the official "
    "--input_size. Needed if the file has no positions.",
    "mask_ratio": "The share of patches that was hidden, from 0 to below 1, the "
    "official --mask_ratio.",
    "norm_pix_loss": "true if each patch of the target was normalised by its mean and "
    "standard deviation, the official --norm_pix_loss.",
    "temperature": "The temperature of Cross-Scale MAE's contrastive loss, the "
    "official --temperature. Default: 0.5.",
    "channel_groups": "SatMAE's groups of bands by index, such as ((0, 1), (2,)), the "
    "official --grouped_bands. Needed unless the groups have 4, 4 and 2 bands.",
    "spatial_mask": "true if SatMAE hid the same patches in all groups of bands, the "
    "official --spatial_mask. Default: false.",
    "band_config": "The sizes in pixels (high, low) to which Scale-MAE shrinks its "
    "targets, such as (14, 224), the official --band_config.",
    "use_l1_loss": "true for an absolute error of Scale-MAE's high frequencies, false "
    "for a squared error, the official --use_l1_loss. Default: true.",
    "l1_loss_weight": "The weight of Scale-MAE's absolute error, the official "
    "--l1_loss_weight. Default: 1.",
    "base_resolution": "The metres per pixel at which Scale-MAE's positions count in "
    "patches, the official --base_resolution. Default: 2.5.",
    "absolute_scale": "true if Scale-MAE's positions did not depend on the GSD, the "
    "official --absolute_scale. Default: false.",
}


def define_flags(values: flags.FlagValues, command: str) -> None:
    """The flags of one of COMMANDS."""

    def text(name, help):
        flags.DEFINE_string(name, None, help, flag_values=values)

    if command == "export":
        text("source", "A run's workdir, an import or the folder of an encoder.")
        text("out", "The folder to write, which must be new or empty.")
        text("format", f"The format: one of {', '.join(FORMATS)}.")
        flags.DEFINE_float(
            "gsd",
            None,
            "Metres per pixel of the images as the model gets them, after resizing to "
            "--image_size. Positions that depend on the GSD are written for it.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "image_size",
            None,
            "Pixels. Positions are written for this size. Default: as in training.",
            flag_values=values,
        )
        return
    text("source", "The official checkpoint, a .pth or .safetensors file.")
    text("out", "The folder to write, which must be new or empty.")
    for name in OPTIONS:
        text(name, MEANINGS[name])
    text(
        "bands",
        "The bands in order: red,green,blue. Needed unless there are three, or they "
        "are SatMAE's ten of Sentinel-2.",
    )
    text(
        "mean",
        "The mean of each band used for normalisation: 0.4,0.4,0.4. Needed with "
        "--bands. Default: the official one.",
    )
    text("std", "The standard deviation of each band, like --mean.")
    text(
        "units",
        "What mean and std are in, such as 'surface reflectance', if the weights read "
        "rasters. Default: 8-bit images, in 0-1.",
    )


def run_import(values: flags.FlagValues) -> str:
    """Import and write; returns what to print."""
    source, out = Path(values.source), Path(values.out)
    options = {name: _literal(name, values[name].value) for name in OPTIONS}
    if values.bands:
        options["bands"] = values.bands.split(",")
    for name in ("mean", "std"):
        if values[name].value:
            options[name] = _numbers(name, values[name].value)
    if values.units:
        options["units"] = values.units
    imported = read_weights(source, **options)
    config = imported.config
    write_import(imported, out, source=source)
    model, part = config.model, "encoder" if imported.encoder_only else "network"
    count = sum(x.size for x in jax.tree.leaves(nnx.state(imported.network)))
    lines = [
        f"{config.method}, {count / 1e6:.2f} M parameters ({part}): patch size "
        f"{model.patch_size}, width {model.embed_dim}, depth {model.depth}, "
        f"{model.num_heads} heads, {model.norm_style}-norm; images of "
        f"{config.views.size} px, {len(config.bands)} bands",
        *imported.notes,
        *_groups(config),
        "all other tensors were imported",
        f"encoder: {out / 'encoder'}",
    ]
    if not imported.encoder_only:
        lines.append(f"to continue pretraining: --config.init={out}")
    return "\n".join(lines)


def _groups(config: ml_collections.ConfigDict) -> list[str]:
    """A line with the groups of bands, by name, if there are any."""
    groups = [
        f"({', '.join(config.bands[band] for band in group)})"
        for group in config.model.get("channel_groups", ())
    ]
    return [f"groups of bands: {', '.join(groups)}"] if groups else []


def _literal(name: str, text: str | None):
    """A flag's value: a number, a boolean, a tuple, or the text itself."""
    if text is None:
        return None
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        if name == "method":
            return text
        raise UserError(
            f"--{name}={text}, expected a number, true, false or a list: see --help"
        ) from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers in a text such as 0.4,0.5."""
    try:
        return tuple(map(float, text.strip("()[]").rstrip(",").split(",")))
    except ValueError:
        raise UserError(f"--{name}={text}, expected numbers: 0.4,0.4,0.4") from None


def parse(argv: list[str]) -> tuple[str, flags.FlagValues]:
    """The command and its flags; raises UserError if they are wrong."""
    if len(argv) < 2 or argv[1] not in COMMANDS:
        found = argv[1] if len(argv) > 1 else "nothing"
        raise UserError(f"{found} given, expected import or export: {example(__doc__)}")
    values = flags.FlagValues()
    define_flags(values, argv[1])
    parse_flags(values, [argv[0], *argv[2:]])
    for name in ("source", "out", "format"):
        if name in values and not values[name].value:
            raise UserError(f"--{name} is missing: {example(__doc__)}")
    out = Path(values.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already: give a new folder")
    return argv[1], values


def convert(argv: list[str]) -> int:
    """Import or export; returns the exit status."""
    command, values = parse(argv)
    # A signal waits until all is written: the next try would refuse a partial folder.
    with StopRequest() as stop:
        try:
            print(run_import(values) if command == "import" else run_export(values))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or 'the output'}: {error.strerror}; "
                "give another --out"
            ) from None
    return 0 if stop.signal is None else 128 + stop.signal


def run_export(values: flags.FlagValues) -> str:
    """Export; returns what to print."""
    notes = export(
        values.source,
        values.out,
        format=values.format,
        gsd=values.gsd,
        image_size=values.image_size,
    )
    return "\n".join([*notes, f"written: {values.out}"])


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae convert`; returns the exit status."""
    return run(
        convert,
        argv,
        doc=__doc__,
        sections={
            f"Flags of {command}": functools.partial(define_flags, command=command)
            for command in COMMANDS
        },
    )
