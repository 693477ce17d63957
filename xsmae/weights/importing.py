"""The weights of others, as an encoder in memory and as folders."""

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
    """An official checkpoint, with other bands, mean and std than the official ones.

    options: those of `import_checkpoint`. Raises UserError as it does, and where the
    bands of other than three are not named or do not fit.
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
            f"{path} is of {channels} bands: name them and say how they were "
            "normalised, with --bands, --mean and --std"
        )
    for name in ("bands", "mean", "std"):
        if len(config[name]) != channels:
            raise UserError(f"--{name} has {len(config[name])}, expected {channels}")
    return imported


def import_weights(
    path: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> Encoder:
    """The encoder of an official checkpoint of Cross-Scale MAE, MAE, SatMAE, Scale-MAE.

        encoder = xsmae.import_weights("mae_pretrain_vit_base.pth")

    path: a .pth or .safetensors file. out: a new folder for what a run can start from
    (`config.init`) and for `encoder/`; without it nothing is kept. options: bands,
    mean, std, and those of `official.OPTIONS`, what the file does not tell. Raises
    UserError where the file is not one, or `out` holds something.
    """
    imported = read_weights(path, **options)
    if out is not None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already: give a new folder")
        write_import(imported, out, source=Path(path))
        return load_encoder(out)
    return encoder_of(imported, Path(path))
