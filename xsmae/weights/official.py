"""Official checkpoints read: which system, which sizes, every key used or named."""

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
from xsmae.models.build import build_encoder
from xsmae.models.position import sincos_1d, sincos_2d
from xsmae.process.files import write_json
from xsmae.train_state import TrainState
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder
from xsmae.weights.layouts import NAMINGS, encoder_weights, load, weights_of
from xsmae.weights.official_config import OfficialFile, config_of
from xsmae.weights.torch_file import read_pytorch
from xsmae.weights.torch_pickle import Namespace

# Tensors of official checkpoints that no output depends on. Scale-MAE computes its
# positions anew for each GSD, and its older checkpoints lack `mask_token_decoder`.
UNUSED = {
    "cross_scale_mae": ("predictor.1.num_batches_tracked",),
    "scale_mae": ("mask_token_decoder", "pos_embed", "decoder_pos_embed"),
}
# What the file cannot tell by its shapes: by the names of the official arguments.
OPTIONS = (
    "method", "num_heads", "decoder_num_heads", "image_size", "mask_ratio",
    "norm_pix_loss", "temperature", "channel_groups", "spatial_mask", "band_config",
    "use_l1_loss", "l1_loss_weight", "base_resolution", "absolute_scale",
)  # fmt: skip
# What official arguments besides mean the same. SatMAE: main_pretrain.py.
ALIASES = {"grouped_bands": "channel_groups"}
# Which of them a method's published setting stands for where nobody tells.
ASSUMED = {
    "mae": ("mask_ratio", "norm_pix_loss"),
    "sat_mae": ("mask_ratio", "norm_pix_loss", "spatial_mask"),
    "scale_mae": ("mask_ratio", "band_config", "use_l1_loss", "l1_loss_weight"),
    "cross_scale_mae": ("mask_ratio", "norm_pix_loss", "temperature"),
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """An official checkpoint as ours.

    config: `method`, `model`, `loss`, `views.size` and the statistics, as a run's
    config has them. network: the method's, or the encoder where the file holds no
    more. notes: what was left out, and why nothing is lost by it.
    """

    config: ml_collections.ConfigDict
    network: nnx.Module
    encoder_only: bool
    notes: tuple[str, ...]

    @property
    def encoder(self) -> nnx.Module:
        """The part that is carried away."""
        return self.network if self.encoder_only else self.network.encoder


def import_checkpoint(path: str | Path, **options: Any) -> Imported:
    """Read an official checkpoint of Cross-Scale MAE, MAE, SatMAE or Scale-MAE.

    `options`, of OPTIONS, go before what the file's saved arguments say. Raises
    UserError where the file is not one, where a size cannot be told, and with the whole
    list where a tensor is missing, left over or of another shape.
    """
    unknown = options.keys() - set(OPTIONS)
    if unknown:
        raise UserError(f"unknown options {sorted(unknown)}, expected of {OPTIONS}")
    options = {k: v for k, v in options.items() if v is not None}
    tensors, arguments, notes = _unpack(path)
    file = OfficialFile(path, tensors, arguments | options)
    for name, value in file.options.items():
        _check_option(name, value)
    method, naming = _system(file)
    encoder_only = file.encoder_only
    config = config_of(file, method, naming, encoder_only)
    assumed = [n for n in ASSUMED[method] if n not in file.options]
    if assumed and not encoder_only:
        notes.append(f"not told by the file, taken as published: {', '.join(assumed)}")
    model = config.model.to_dict()
    unused = [name for name in UNUSED.get(method, ()) if name in tensors]
    if unused:
        notes.append(f"of no effect on any output: {', '.join(unused)}")
    sizes = {"channels": len(config.bands)}
    try:
        computed = _computed(model, naming, config.views.size, encoder_only)
        if encoder_only:
            weights = encoder_weights(model, naming=naming)
            build = build_encoder
        else:
            weights = weights_of(model, method=method, naming=naming)
            build, sizes["view_size"] = METHODS[method].build, config.views.size
        # Shapes alone, without the time that random weights take.
        network = nnx.eval_shape(lambda: build(model, **sizes, rngs=nnx.Rngs(0)))
    except ValueError as error:
        raise UserError(f"{path} does not fit together: {error}") from None
    others = {name: array.shape for name, array in computed.items()}
    if NAMINGS[naming].position not in tensors:
        del others[NAMINGS[naming].position]  # the user has given the image's size
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
    return Imported(config, network, encoder_only, tuple(notes))


def _unpack(path: str | Path) -> tuple[dict, dict, list[str]]:
    """The tensors, the saved arguments, and what else is left out."""
    content = read_pytorch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict")
    name = next((n for n in ("model", "state_dict") if n in content), None)
    state = content if name is None else content[name]
    if not (isinstance(state, Mapping) and state):
        raise UserError(f"{path} holds no weights under 'model' or 'state_dict'")
    others = [key for key, value in state.items() if not isinstance(value, np.ndarray)]
    if others:
        raise UserError(f"{path} holds no tensors under {', '.join(map(str, others))}")
    notes, arguments = [], {}
    if name is not None:
        saved = content.get("args")
        if isinstance(saved, Namespace):
            arguments = {ALIASES.get(k, k): v for k, v in vars(saved).items()}
            arguments = {
                k: v
                for k, v in arguments.items()
                # An empty list of groups is the official default: no groups.
                if k in OPTIONS and k != "method" and v not in (None, [], ())
            }
        rest = [str(key) for key in content if key not in (name, "args")]
        if rest:
            notes.append(f"not weights: {', '.join(rest)}")
    # DistributedDataParallel's.
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    return state, arguments, notes


def _check_option(name: str, value: Any) -> None:
    """Raises UserError where the value is not of the kind that `name` has."""
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
    """The method and the naming, from the keys."""
    given = file.options.get("method")
    keys = file.tensors
    for naming in ("cross_scale_xformers", "cross_scale_timm", "timm"):
        if file.count(NAMINGS[naming].blocks):
            break
    else:
        raise UserError(
            f"{file.path} holds the weights of no system that is known here (Cross-"
            f"Scale MAE, MAE, SatMAE, Scale-MAE); its first keys: "
            f"{', '.join(list(keys)[:4])}"
        )
    if naming != "timm":
        # Its baseline without the cross-prediction is an MAE by other names.
        whole = any(key.startswith("predictor.") for key in keys)
        found = "cross_scale_mae" if whole or file.encoder_only else "mae"
    elif file.count("patch_embed.{}"):
        found = "sat_mae"
    elif any(key.startswith(("fpn.", "fcn")) for key in keys):
        found = "scale_mae"
    else:
        # Their encoders alone have one layout: SatMAE's of RGB, Scale-MAE's.
        return (given or "mae"), naming
    if given and given != found:
        raise UserError(f"{file.path} is a {found} by its keys, --method={given} given")
    return found, naming


def _computed(
    model: dict, naming: str, size: int, encoder_only: bool
) -> dict[str, np.ndarray]:
    """The encodings of positions and groups that lie beside the weights."""
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
            # The decoder's class token counts as one more group.
            many = np.arange(groups + (part == "decoder_"))
            computed[f"{part}channel_embed"] = np.asarray(sincos_1d(many, group_dim))[
                None
            ]
    return computed


def _check_computed(file: OfficialFile, name: str, expected: np.ndarray) -> None:
    tensor = np.asarray(file.tensors[name], np.float32)
    # Half precision has 11 bits; NaN is no number that is close.
    if not np.abs(tensor - expected).max() <= 2e-3:
        raise UserError(
            f"{file.path}: {name} {tensor.shape} is not the sine-cosine encoding that "
            "the system computes: learned or resized positions have no place here"
        )


def sha256_of(source: Path) -> str:
    """The digest of an official checkpoint."""
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
    """Write `encoder/`; of a whole network config.json and a checkpoint too."""
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
    names = ("method", "model", "loss", "bands", "mean", "std")
    write_json(
        out / "config.json",
        {
            **{name: saved[name] for name in names},
            "views": {"size": config.views.size},
            "import": {"source": source.name, "sha256": digest},
        },
    )
