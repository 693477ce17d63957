"""Imports official weights, as an encoder in memory or as a folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xsmae.bands import Bands
from xsmae.errors import UserError
from xsmae.weights.encoder import Encoder, load_encoder
from xsmae.weights.official import Imported, encoder_of, import_checkpoint, write_import
from xsmae.weights.official_bands import bands_note, set_bands


def read_weights(
    path: str | os.PathLike,
    *,
    bands: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    units: str | None = None,
    **options: Any,
) -> Imported:
    """Read an official checkpoint, optionally with other bands, mean and std.

    units: what mean and std are in, for weights of rasters; None: 8-bit images, or as
    published. options: those of `import_checkpoint`. Raises UserError like
    `import_checkpoint`, and if bands, mean and std do not fit the file, or are missing
    although the file has other bands than those that are published.
    """
    imported = import_checkpoint(path, **options)
    config = imported.config
    channels = len(config.mean)  # of the file
    given = {"bands": bands, "mean": mean, "std": std}
    given = {name: tuple(value) for name, value in given.items() if value is not None}
    published = imported.known_bands and not given and units is None
    if channels != 3 and len(given) < 3 and not published:
        raise UserError(
            f"{path} has {channels} bands: give their names with --bands, and their "
            "normalisation with --mean and --std"
        )
    for name, value in given.items():
        if len(value) != channels:
            raise UserError(
                f"--{name} has {len(value)}, expected {channels}: give one value per "
                "band of the file"
            )
    if channels != 3 and published:
        notes = (*imported.notes, bands_note(config))
        return dataclasses.replace(imported, notes=notes)
    numbers = (
        given.get(name, tuple(config[name])) for name in ("bands", "mean", "std")
    )
    stored = {} if units is None else {"dtype": "float32", "units": units}
    set_bands(config, Bands(*numbers, **stored))
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
    options: bands, mean, std, units, and the `official.OPTIONS` that the file does not
    state. Raises UserError if the file is not such a checkpoint, or if `out` is not
    empty.
    """
    imported = read_weights(path, **options)
    if out is not None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already: give a new folder")
        write_import(imported, out, source=Path(path))
        return load_encoder(out)
    return encoder_of(imported, Path(path))
