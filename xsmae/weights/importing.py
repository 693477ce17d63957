"""The weights of others, as an encoder in memory and as folders."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xsmae.errors import UserError
from xsmae.process.files import write_json
from xsmae.weights.encoder import LoadedEncoder, load_encoder, write_encoder
from xsmae.weights.export import export as export_folder
from xsmae.weights.official import Imported, import_checkpoint, write_import


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
) -> LoadedEncoder:
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
    with tempfile.TemporaryDirectory() as folder:
        encoder = Imported(imported.config, imported.encoder, True, imported.notes)
        write_import(encoder, Path(folder), source=Path(path))
        return load_encoder(folder)


def export(
    encoder: LoadedEncoder | str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str,
    gsd: float | None = None,
    image_size: int | None = None,
) -> list[str]:
    """Write an encoder as timm or Hugging Face load it; returns what is to be known.

        xsmae.export("runs/mine", "mine-timm", format="timm")

    encoder: one in memory, its folder, or a run's workdir. The rest as in
    `xsmae.weights.export.export`.
    """
    with folder_of(encoder) as folder:
        return export_folder(folder, out, format=format, gsd=gsd, image_size=image_size)


@contextlib.contextmanager
def folder_of(encoder: LoadedEncoder | str | os.PathLike) -> Iterator[Path]:
    """The folder of an encoder; for one in memory, one that is there meanwhile."""
    if isinstance(encoder, str | os.PathLike):
        yield Path(encoder)
        return
    if not isinstance(encoder, LoadedEncoder):
        raise UserError(
            f"encoder={encoder!r}, expected an encoder, or the folder of one"
        )
    info = encoder.info
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(
            Path(folder),
            encoder.encoder,
            model=info["architecture"],
            **{n: info[n] for n in ("image_size", "bands", "mean", "std")},
            run=info.get("run") or {},
        )
        write_json(Path(folder) / "encoder.json", info)
        yield Path(folder)
