"""Official checkpoints read: which system, which sizes, every key used or named."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from flax import nnx

import xsmae.configs.common as common
from xsmae.errors import UserError
from xsmae.layouts import NAMINGS, encoder_weights, load, weights_of
from xsmae.methods import METHODS
from xsmae.models.position import sincos_1d, sincos_2d
from xsmae.networks import build_encoder
from xsmae.torch_file import Namespace, read_pytorch

# Heads by width: ViT's standard sizes, and the decoders' of MAE and of our tiny.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_NUM_HEADS = {512: 16, 128: 4}
# SatMAE's groups of its ten Sentinel-2 bands (models_mae_group_channels.py), by sizes.
CHANNEL_GROUPS = {(4, 4, 2): ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))}

FMOW = (0.43393, 0.43579, 0.40744), (0.19828, 0.19250, 0.19454)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the official pretraining normalised RGB with. Scale-MAE: config/fmow.yaml.
# SatMAE: util/datasets.py, CustomDatasetFromImages.
STATISTICS = {
    "cross_scale_mae": FMOW,
    "mae": IMAGENET,
    "scale_mae": IMAGENET,
    "sat_mae": (
        (0.4182007312774658, 0.4214799106121063, 0.3991275727748871),
        (0.28774282336235046, 0.27541765570640564, 0.2764017581939697),
    ),
}
BASE_RESOLUTION = 2.5  # metres per pixel; Scale-MAE, main_pretrain.py

# Tensors of official checkpoints that no output depends on. Scale-MAE computes its
# positions anew for each GSD, and its older checkpoints lack `mask_token_decoder`.
UNUSED = {
    "cross_scale_mae": ("predictor.1.num_batches_tracked",),
    "scale_mae": ("mask_token_decoder", "pos_embed", "decoder_pos_embed"),
}
# Of networks that are more than an encoder.
DECODERS = ("decoder", "mask_token", "predictor.", "fpn.", "fcn")

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
    file = _File(path, tensors, arguments | options)
    for name, value in file.options.items():
        _check_option(name, value)
    method, naming = _system(file)
    encoder_only = file.encoder_only
    config = _config(file, method, naming, encoder_only)
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


@dataclasses.dataclass(frozen=True)
class _File:
    """A checkpoint's tensors, and what it or the user says besides."""

    path: str | Path
    tensors: Mapping[str, np.ndarray]
    options: Mapping[str, Any]

    @property
    def encoder_only(self) -> bool:
        """Whether there is nothing of a decoder."""
        return not self.holds(*DECODERS)

    def holds(self, *beginnings: str) -> bool:
        """Whether there is a name that begins so."""
        return any(name.startswith(beginnings) for name in self.tensors)

    def size(self, *places: tuple[str, int, int]) -> int:
        """A size that tensors at (name, rank, axis) share: what most of them say.

        A tensor that says otherwise is then told with all that does not fit.
        """
        found = [
            self.tensors[name].shape[axis]
            for name, rank, axis in places
            if name in self.tensors and self.tensors[name].ndim == rank
        ]
        if not found:
            self.shape(*places[0][:2])  # raises
        return collections.Counter(found).most_common(1)[0][0]

    def group_dim(self, name: str, position: str, width: int) -> int:
        """The width of SatMAE's encodings of groups under `name`."""
        one, _, group_dim = shape = self.shape(name, 3)
        of_positions = self.tensors[position].shape if position in self.tensors else ()
        rest = of_positions[-1] if of_positions else width - group_dim
        if one != 1 or group_dim + rest != width:
            raise UserError(
                f"{self.path}: {name} has shape {shape} and {position} {of_positions}, "
                f"expected {width} in the last of both together"
            )
        return group_dim

    def kernel(self, name: str) -> tuple[int, ...]:
        """The shape of a convolution's square kernel."""
        shape = self.shape(name, 4)
        if shape[2] != shape[3]:
            raise UserError(
                f"{self.path}: {name} has shape {shape}, expected a square kernel in "
                "the last two"
            )
        return shape

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of a tensor that sizes are read from."""
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            found = f"; the nearest names found: {', '.join(near)}" if near else ""
            raise UserError(f"{self.path} lacks {name}{found}")
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise UserError(f"{self.path}: {name} has shape {shape}, expected {rank}-D")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest index in the names `pattern.format(index)...`.

        At most the number of tensors, whatever the names claim.
        """
        expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"\.")
        found = [m for m in map(expression.match, self.tensors) if m]
        largest = max((int(m[1]) + 1 for m in found), default=0)
        return min(largest, len(self.tensors))

    def heads(self, name: str, width: int, standard: Mapping[int, int]) -> int:
        """How many heads, which no shape tells."""
        value = self.options.get(name, standard.get(width))
        if value is None:
            raise UserError(
                f"{self.path}: the number of heads of width {width} is not a standard "
                f"one: give --{name}=N"
            )
        return value


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


def _system(file: _File) -> tuple[str, str]:
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


def _config(
    file: _File, method: str, naming: str, encoder_only: bool
) -> ml_collections.ConfigDict:
    """The config of the network that the tensors are of."""
    if method not in METHODS:
        raise UserError(f"--method={method}, expected one of {', '.join(METHODS)}")
    config = common.get_common("published", "base", method)
    model, names = config.model, NAMINGS[naming]
    model.dtype = "float32"
    model.embed_dim = file.size(
        ("cls_token", 3, 2),
        (f"{names.norm}.weight", 1, 0),
        (f"{names.norm}.bias", 1, 0),
    )
    num_groups = file.count("patch_embed.{}")
    embeds = [f"patch_embed.{i}.proj.weight" for i in range(num_groups)]
    shapes = [file.kernel(n) for n in embeds or ["patch_embed.proj.weight"]]
    model.patch_size = shapes[0][-1]
    model.depth = file.count(names.blocks)
    model.num_heads = file.heads("num_heads", model.embed_dim, NUM_HEADS)
    block = names.block(names.blocks.format(0), ())
    mlp = {weight.path: weight.name for weight in block}
    hidden = file.size(
        (mlp["fc1", "bias"], 1, 0),
        (mlp["fc1", "kernel"], 2, 0),
        (mlp["fc2", "kernel"], 2, 1),
    )
    model.mlp_ratio = hidden / model.embed_dim
    if int(model.embed_dim * model.mlp_ratio) < hidden:  # rounded down
        model.mlp_ratio = math.nextafter(model.mlp_ratio, math.inf)
    xformers = naming == "cross_scale_xformers"
    model.norm_style = "post" if xformers else "pre"
    model.norm_epsilon = 1e-5 if xformers else 1e-6
    model.encoder_norm = naming == "timm"
    model.mask_ratio = float(file.options.get("mask_ratio", model.mask_ratio))
    if not encoder_only:
        model.decoder_embed_dim = file.size(
            ("mask_token", 3, 2),
            ("decoder_norm.weight", 1, 0),
            ("decoder_norm.bias", 1, 0),
        )
        model.decoder_depth = file.count(names.decoder_blocks)
        width, standard = model.decoder_embed_dim, DECODER_NUM_HEADS
        model.decoder_num_heads = file.heads("decoder_num_heads", width, standard)
    config.views.size = _image_size(file, names.position, model.patch_size)
    channels = sum(shape[1] for shape in shapes)
    if channels == 3:
        config.mean, config.std = STATISTICS[method]
    else:
        config.bands = tuple(f"band{i}" for i in range(channels))
        config.mean, config.std = (0.0,) * channels, (1.0,) * channels
    if num_groups:
        _group_config(file, config, [shape[1] for shape in shapes], encoder_only)
    if method == "scale_mae":
        _scale_config(file, config, encoder_only)
    else:
        loss = config.loss.reconstruction
        if num_groups:
            loss.norm_pix_loss = False  # SatMAE's recipe for groups of bands
        value = file.options.get("norm_pix_loss", loss.norm_pix_loss)
        loss.norm_pix_loss = bool(value)
    if method == "cross_scale_mae" and not encoder_only:
        model.predictor_hidden_dim = file.size(
            ("predictor.0.bias", 1, 0),
            ("predictor.0.weight", 2, 0),
            ("predictor.3.weight", 2, 1),
        )
        temperature = file.options.get("temperature", 0.5)
        config.loss.contrastive.temperature = float(temperature)
    return config


def _group_config(file, config, sizes: list[int], encoder_only: bool) -> None:
    model, sizes = config.model, tuple(sizes)
    groups = file.options.get("channel_groups", CHANNEL_GROUPS.get(sizes))
    if groups is None:
        raise UserError(
            f"{file.path} has groups of {sizes} bands, expected SatMAE's (4, 4, 2): "
            "say which bands with --channel_groups, as ((0, 1), (2,))"
        )
    groups = tuple(tuple(group) for group in groups)
    if tuple(map(len, groups)) != sizes:
        raise UserError(
            f"channel_groups={groups} for groups of {sizes} bands in {file.path}"
        )
    model.channel_groups = groups
    model.group_dim = file.group_dim("channel_embed", "pos_embed", model.embed_dim)
    model.spatial_mask = bool(file.options.get("spatial_mask", False))
    if not encoder_only:
        model.decoder_group_dim = file.group_dim(
            "decoder_channel_embed", "decoder_pos_embed", model.decoder_embed_dim
        )


def _scale_config(file, config, encoder_only: bool) -> None:
    model, loss, options = config.model, config.loss, file.options
    model.reference_gsd = float(options.get("base_resolution", BASE_RESOLUTION))
    if options.get("absolute_scale"):
        model.position = "fixed"  # the official code then sets every resolution to 1
    if encoder_only:
        return
    model.independent_heads = not file.holds("fcn.")
    head = "fcn_low" if model.independent_heads else "fcn"
    model.progressive = not file.holds("fpn.fpn1.3.")
    model.head_dim = file.size(
        (f"{head}.proj.bias", 1, 0),
        (f"{head}.proj.weight", 4, 0),
        (f"{head}.pred.0.ln.weight", 1, 0),
    )
    model.head_depth = file.count(f"{head}.conv_blocks.{{}}")
    stride = file.kernel(f"{head}.pred.1.weight")[-1]
    scale, rest = divmod(8 * stride, model.patch_size)
    if rest:
        raise UserError(
            f"{file.path} predicts {8 * stride} px for each patch of "
            f"{model.patch_size} px, expected a multiple of them"
        )
    model.target_scale = scale
    size = config.views.size * scale
    low, high = options.get("band_config", (size / 32, 0))
    loss.high_frequency.cutoff = low / size
    # 224 alone has a meaning of its own in the official forward_loss.
    loss.low_frequency.through = 224 if high == 224 else 0
    absolute = bool(options.get("use_l1_loss", True))
    loss.high_frequency.absolute = absolute
    # The official weight applies to the L1 alone.
    weight = float(options.get("l1_loss_weight", 1.0))
    loss.high_frequency.weight = weight if absolute else 1.0


def _image_size(file: _File, position: str, patch_size: int) -> int:
    """The pixels of the images that the network was trained on."""
    if position not in file.tensors:
        if "image_size" in file.options:
            return file.options["image_size"]
        raise UserError(
            f"{file.path} lacks {position}, which tells the image's size: give "
            "--image_size=PIXELS"
        )
    patches = file.shape(position, 3)[1] - 1
    side = round(patches**0.5)
    if side**2 != patches:
        raise UserError(f"{file.path}: {position} is of {patches} patches, no square")
    size = side * patch_size
    if file.options.get("image_size", size) != size:
        raise UserError(
            f"image_size={file.options['image_size']}, but {position} in {file.path} "
            f"is that of {size} px"
        )
    return size


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


def _check_computed(file: _File, name: str, expected: np.ndarray) -> None:
    tensor = np.asarray(file.tensors[name], np.float32)
    # Half precision has 11 bits; NaN is no number that is close.
    if not np.abs(tensor - expected).max() <= 2e-3:
        raise UserError(
            f"{file.path}: {name} {tensor.shape} is not the sine-cosine encoding that "
            "the system computes: learned or resized positions have no place here"
        )
