"""Reads official checkpoints: finds system and sizes, accounts for every key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from xsmae.bands import Bands
from xsmae.checkpoints import Checkpoints
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.models.build import build_encoder, channel_groups
from xsmae.models.position import sincos_1d, sincos_2d
from xsmae.process.files import write_json
from xsmae.train_state import TrainState
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder
from xsmae.weights.layouts import NAMINGS, encoder_weights, load, weights_of
from xsmae.weights.official_bands import published_bands, set_bands
from xsmae.weights.official_config import OfficialFile, config_of
from xsmae.weights.torch_file import read_pytorch
from xsmae.weights.torch_pickle import Namespace

BAND_FIELDS = ("bands", "mean", "std", "dtype", "units", "wavelengths")
# Tensors of official checkpoints that do not affect any output. Scale-MAE computes its
# positions for each GSD. Its older checkpoints lack `mask_token_decoder`.
UNUSED = {
    "cross_scale_mae": ("predictor.1.num_batches_tracked",),
    "scale_mae": ("mask_token_decoder", "pos_embed", "decoder_pos_embed"),
}
# Settings that shapes do not show, by the names of the official arguments.
OPTIONS = (
    "method", "num_heads", "decoder_num_heads", "image_size", "mask_ratio",
    "norm_pix_loss", "temperature", "channel_groups", "spatial_mask", "band_config",
    "use_l1_loss", "l1_loss_weight", "base_resolution", "absolute_scale",
)  # fmt: skip
# Saved arguments that say which bands there are; read by `published_bands`.
SAVED = ("dataset_type", "dropped_bands")
# Other official names for the same settings. SatMAE: main_pretrain.py.
ALIASES = {"grouped_bands": "channel_groups"}
# Settings that get the published value if neither the file nor the user gives one.
ASSUMED = {
    "mae": ("mask_ratio", "norm_pix_loss"),
    "sat_mae": ("mask_ratio", "norm_pix_loss", "spatial_mask"),
    "scale_mae": ("mask_ratio", "band_config", "use_l1_loss", "l1_loss_weight"),
    "cross_scale_mae": ("mask_ratio", "norm_pix_loss", "temperature"),
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """An official checkpoint, converted.

    config: `method`, `model`, `loss`, `views.size` and the statistics, as in a run's
    config. network: the method's network, or only the encoder if the file has no more.
    notes: what was left out, and why that loses nothing. known_bands: True if names,
    mean and std of the bands are the published ones; otherwise they are numbers, 0, 1.
    """

    config: ml_collections.ConfigDict
    network: nnx.Module
    encoder_only: bool
    notes: tuple[str, ...]
    known_bands: bool

    @property
    def encoder(self) -> nnx.Module:
        """The encoder of the network."""
        return self.network if self.encoder_only else self.network.encoder


def import_checkpoint(path: str | Path, **options: Any) -> Imported:
    """Read an official checkpoint of Cross-Scale MAE, MAE, SatMAE or Scale-MAE.

    options: any of OPTIONS; they override the arguments saved in the file. Raises
    UserError if the file is not such a checkpoint, if a size cannot be found, or with
    the full list if tensors are missing, left over or have another shape.
    """
    unknown = options.keys() - set(OPTIONS)
    if unknown:
        raise UserError(
            f"unknown options {sorted(unknown)}, expected some of {', '.join(OPTIONS)}"
        )
    options = {k: v for k, v in options.items() if v is not None}
    tensors, arguments, notes = _unpack(path)
    saved = {name: arguments.pop(name) for name in SAVED if name in arguments}
    file = OfficialFile(path, tensors, arguments | options, saved)
    for name, value in file.options.items():
        _check_option(name, value)
    method, naming = _system(file)
    encoder_only = file.encoder_only
    config = config_of(file, method, naming, encoder_only)
    bands = published_bands(
        file, method, len(config.bands), channel_groups(config.model)
    )
    if bands is not None:
        set_bands(config, bands)
    assumed = [n for n in ASSUMED[method] if n not in file.options]
    if assumed and not encoder_only:
        notes.append(f"not in the file, set as published: {', '.join(assumed)}")
    model = config.model.to_dict()
    unused = [name for name in UNUSED.get(method, ()) if name in tensors]
    if unused:
        notes.append(f"without effect on any output: {', '.join(unused)}")
    sizes = {"channels": len(config.bands)}
    try:
        computed = _computed(model, naming, config.views.size, encoder_only)
        if encoder_only:
            weights = encoder_weights(model, naming=naming)
            build = build_encoder
        else:
            weights = weights_of(model, method=method, naming=naming)
            build, sizes["view_size"] = METHODS[method].build, config.views.size
        # Only shapes: random weights would take time.
        network = nnx.eval_shape(lambda: build(model, **sizes, rngs=nnx.Rngs(0)))
    except ValueError as error:
        raise UserError(f"{path} is inconsistent: {error}") from None
    others = {name: array.shape for name, array in computed.items()}
    if NAMINGS[naming].position not in tensors:
        del others[NAMINGS[naming].position]  # the user gave the image size
    if method == "cross_scale_mae" and not encoder_only:
        others["predictor.1.num_batches_tracked"] = ()
    if "mask_token_decoder" in unused:
        others["mask_token_decoder"] = (1, 1, model["decoder_embed_dim"])
    try:
        load(network, weights, tensors, others=others)
    except UserError as error:
        raise UserError(f"{path}, read as {method}: {error}") from None
    checked = [name for name in computed if name in tensors and name not in unused]
    for name in checked:
        _check_computed(file, name, computed[name])
    if checked:
        notes.append(f"computed, not learned: {', '.join(checked)} (checked)")
    return Imported(config, network, encoder_only, tuple(notes), bands is not None)


def _unpack(path: str | Path) -> tuple[dict, dict, list[str]]:
    """The tensors, the saved arguments, and notes about everything left out."""
    content = read_pytorch(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} has a {type(content).__name__}, expected a dict of weights: give "
            "another checkpoint"
        )
    name = next((n for n in ("model", "state_dict") if n in content), None)
    state = content if name is None else content[name]
    if not (isinstance(state, Mapping) and state):
        raise UserError(
            f"{path} has no weights under 'model' or 'state_dict': give another "
            "checkpoint"
        )
    others = [key for key, value in state.items() if not isinstance(value, np.ndarray)]
    if others:
        raise UserError(
            f"{path} has values that are not tensors, {', '.join(map(str, others))}: "
            "give another checkpoint"
        )
    notes, arguments = [], {}
    if name is not None:
        saved = content.get("args")
        if isinstance(saved, Namespace):
            arguments = {ALIASES.get(k, k): v for k, v in vars(saved).items()}
            arguments = {
                k: v
                for k, v in arguments.items()
                # The official default, an empty list, means no groups.
                if k in (*OPTIONS, *SAVED) and k != "method" and v not in (None, [], ())
            }
        rest = [str(key) for key in content if key not in (name, "args")]
        if rest:
            notes.append(f"not weights: {', '.join(rest)}")
    # DistributedDataParallel adds this prefix.
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    return state, arguments, notes


def _check_option(name: str, value: Any) -> None:
    """Raise UserError if `value` is not valid for the option `name`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    sequence = isinstance(value, list | tuple)
    if name in ("num_heads", "decoder_num_heads", "image_size"):
        fits, expected = number and isinstance(value, int) and value > 0, "1, 2, ..."
    elif name == "mask_ratio":
        fits, expected = number and 0 <= value < 1, "a number in [0, 1)"
    elif name in ("temperature", "base_resolution"):
        fits = number and 0 < value < math.inf
        expected = "a number above 0"
    elif name == "l1_loss_weight":
        fits, expected = number and 0 <= value < math.inf, "a number from 0"
    elif name == "channel_groups":
        fits = sequence and all(
            isinstance(group, list | tuple)
            and all(isinstance(band, int) for band in group)
            for group in value
        )
        expected = "groups of bands by index, ((0, 1), (2,))"
    elif name == "band_config":
        fits = (
            sequence
            and len(value) == 2
            and all(isinstance(size, int | float) and size >= 0 for size in value)
        )
        expected = "two sizes in pixels, (14, 224)"
    elif name == "method":
        fits, expected = isinstance(value, str), "a name"
    else:
        fits, expected = isinstance(value, bool), "true or false"
    if not fits:
        raise UserError(f"{name}={value!r}, expected {expected}")


def _system(file: OfficialFile) -> tuple[str, str]:
    """The method and the naming that the keys show."""
    given = file.options.get("method")
    keys = file.tensors
    for naming in ("cross_scale_xformers", "cross_scale_timm", "timm"):
        if file.count(NAMINGS[naming].blocks):
            break
    else:
        raise UserError(
            f"{file.path} has the keys {', '.join(list(keys)[:4])}, ..., expected "
            "weights of Cross-Scale MAE, MAE, SatMAE or Scale-MAE: give another "
            "checkpoint"
        )
    if naming != "timm":
        # Cross-Scale MAE's baseline without cross-prediction is an MAE, renamed.
        whole = any(key.startswith("predictor.") for key in keys)
        found = "cross_scale_mae" if whole or file.encoder_only else "mae"
    elif file.count("patch_embed.{}"):
        found = "sat_mae"
    elif any(key.startswith(("fpn.", "fcn")) for key in keys):
        found = "scale_mae"
    else:
        # MAE, SatMAE on RGB and Scale-MAE encoders have the same layout.
        return (given or "mae"), naming
    if given and given != found:
        raise UserError(
            f"--method={given}, but the keys of {file.path} are those of {found}: give "
            f"--method={found} or leave it out"
        )
    return found, naming


def _computed(
    model: dict, naming: str, size: int, encoder_only: bool
) -> dict[str, np.ndarray]:
    """The encodings of positions and groups that the file stores with the weights."""
    grid, groups = size // model["patch_size"], len(model.get("channel_groups", ()))
    parts, computed = {"": NAMINGS[naming].position}, {}
    if not encoder_only:
        parts["decoder_"] = "decoder_pos_embed"
    for part, name in parts.items():
        group_dim = model[f"{part}group_dim"] if groups else 0
        at = np.arange(grid)
        positions = sincos_2d(at, at, model[f"{part}embed_dim"] - group_dim)
        computed[name] = np.pad(positions, [(1, 0), (0, 0)])[None]
        if groups:
            # The decoder's class token counts as another group.
            many = np.arange(groups + (part == "decoder_"))
            computed[f"{part}channel_embed"] = np.asarray(sincos_1d(many, group_dim))[
                None
            ]
    return computed


def _check_computed(file: OfficialFile, name: str, expected: np.ndarray) -> None:
    tensor = np.asarray(file.tensors[name], np.float32)
    # Half precision has 11 bits. `not <=` also catches NaN.
    if not np.abs(tensor - expected).max() <= 2e-3:
        raise UserError(
            f"{file.path}: {name} {tensor.shape} is not the sine-cosine encoding that "
            "the system computes; learned or resized positions cannot be imported: "
            "give the original checkpoint"
        )


def sha256_of(source: Path) -> str:
    """The SHA-256 of an official checkpoint."""
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoder_of(imported: Imported, source: Path) -> Encoder:
    """The encoder of an import, in memory."""
    config = imported.config
    run = {"method": config.method, "import": source.name, "sha256": sha256_of(source)}
    described = describe_encoder(
        config.model, image_size=config.views.size, bands=Bands.of(config), run=run
    )
    return Encoder(imported.encoder, described)


def write_import(imported: Imported, out: Path, *, source: Path, seed: int = 0) -> None:
    """Write `encoder/`, and for a whole network config.json and a checkpoint."""
    config, digest = imported.config, sha256_of(source)
    encoder_of(imported, source).save(out / "encoder")
    if imported.encoder_only:
        return
    _, params, batch_stats = nnx.split(imported.network, nnx.Param, nnx.BatchStat)
    zero = jnp.zeros((), jnp.int32)
    checkpoints = Checkpoints(out / "checkpoints")
    state = TrainState(
        step=zero,
        params=params,
        batch_stats=batch_stats,
        opt_state=(),
        key=jax.random.key(seed),
        nonfinite=zero,
        nonfinite_in_a_row=zero,
    )
    checkpoints.save(0, state, fingerprint=digest)
    checkpoints.close()
    saved = json.loads(config.to_json())
    names = ("method", "model", "loss", *BAND_FIELDS)
    write_json(
        out / "config.json",
        {
            **{name: saved[name] for name in names if name in saved},
            "views": {"size": config.views.size},
            "import": {"source": source.name, "sha256": digest},
        },
    )
