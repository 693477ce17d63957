"""Imports official weights, as an encoder in memory or as a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xsmae.errors import UserError
from xsmae.weights.encoder import Encoder, load_encoder
from xsmae.weights.official import Imported, encoder_of, import_checkpoint, write_import


def read_weights(
    path: str | os.PathLike,
    *,
    bands: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Imported:
    """Read an official checkpoint, optionally with other bands, mean and std.

    options: those of `import_checkpoint`. Raises UserError like `import_checkpoint`,
    and if bands, mean or std are missing for a file without exactly 3 bands, or do not
    fit the file.
    """
    imported = import_checkpoint(path, **options)
    config = imported.config
    channels = len(config.mean)  # of the file
    with config.ignore_type():
        for name, value in (("bands", bands), ("mean", mean), ("std", std)):
            if value is not None:
                config[name] = tuple(value)
    if channels != 3 and any(value is None for value in (bands, mean, std)):
        raise UserError(
            f"{path} has {channels} bands: give their names with --bands, and their "
            "normalisation with --mean and --std"
        )
    for name in ("bands", "mean", "std"):
        if len(config[name]) != channels:
            raise UserError(
                f"--{name} has {len(config[name])}, expected {channels}: give one "
                "value per band of the file"
            )
    return imported


def import_weights(
    path: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> Encoder:
    """The encoder of an official checkpoint of Cross-Scale MAE, MAE, SatMAE, Scale-MAE.

        encoder = xsmae.import_weights("mae_pretrain_vit_base.pth")

    path: a .pth or .safetensors file. out: a new folder, for `encoder/` and for the
    weights that a run can start from (`config.init`); without it nothing is written.
    options: bands, mean, std, and the `official.OPTIONS` that the file does not state.
    Raises UserError if the file is not such a checkpoint, or if `out` is not empty.
    """
    imported = read_weights(path, **options)
    if out is not None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already: give a new folder")
        write_import(imported, out, source=Path(path))
        return load_encoder(out)
    return encoder_of(imported, Path(path))
