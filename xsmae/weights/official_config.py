"""Derives the config of an official checkpoint from its shapes and arguments."""

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

import xsmae.configs.common as common
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.weights.layouts import NAMINGS

# Methods that have official checkpoints.
PUBLISHED = tuple(name for name in METHODS if "published" in METHODS[name].presets)
# width -> heads: ViT's standard sizes, and the decoders of MAE and our tiny preset.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_NUM_HEADS = {512: 16, 128: 4}
# sizes -> SatMAE's groups of ten Sentinel-2 bands (models_mae_group_channels.py).
CHANNEL_GROUPS = {(4, 4, 2): ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))}

BASE_RESOLUTION = 2.5  # metres per pixel; Scale-MAE, main_pretrain.py

# Names that only networks with more than an encoder have.
DECODERS = ("decoder", "mask_token", "predictor.", "fpn.", "fcn")


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """A checkpoint's tensors, and the options from the file or the user.

    saved: arguments in the file that are no options, see `official.SAVED`.
    """

    path: str | Path
    tensors: Mapping[str, np.ndarray]
    options: Mapping[str, Any]
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def encoder_only(self) -> bool:
        """True if the file has no tensor of a decoder."""
        return not self.holds(*DECODERS)

    def holds(self, *beginnings: str) -> bool:
        """True if a tensor's name starts with one of `beginnings`."""
        return any(name.startswith(beginnings) for name in self.tensors)

    def size(self, *places: tuple[str, int, int]) -> int:
        """The most frequent size among tensors at (name, rank, axis).

        A tensor with another size is reported later, with all that do not fit.
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
        """The width of SatMAE's group encodings in the tensor `name`."""
        one, _, group_dim = shape = self.shape(name, 3)
        of_positions = self.tensors[position].shape if position in self.tensors else ()
        rest = of_positions[-1] if of_positions else width - group_dim
        if one != 1 or group_dim + rest != width:
            raise UserError(
                f"{self.path}: {name} has shape {shape} and {position} {of_positions}, "
                f"expected last axes that add up to {width}"
            )
        return group_dim

    def kernel(self, name: str) -> tuple[int, ...]:
        """The shape of a convolution's square kernel."""
        shape = self.shape(name, 4)
        if shape[2] != shape[3]:
            raise UserError(
                f"{self.path}: {name} has shape {shape}, expected a square kernel in "
                "the last two axes"
            )
        return shape

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor; UserError if it is missing or has another rank."""
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            found = f"; similar names in it: {', '.join(near)}" if near else ""
            raise UserError(f"{self.path} lacks {name}{found}")
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise UserError(f"{self.path}: {name} has shape {shape}, expected {rank}-D")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest index in the names `pattern.format(index)...`.

        Never more than the number of tensors, so that a name cannot claim a huge count.
        """
        expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"\.")
        found = [m for m in map(expression.match, self.tensors) if m]
        largest = max((int(m[1]) + 1 for m in found), default=0)
        return min(largest, len(self.tensors))

    def heads(self, name: str, width: int, standard: Mapping[int, int]) -> int:
        """The number of heads, which cannot be read from shapes."""
        value = self.options.get(name, standard.get(width))
        if value is None:
            raise UserError(
                f"{self.path}: width {width} has no standard number of heads: give "
                f"--{name}=N"
            )
        return value


def config_of(
    file: OfficialFile, method: str, naming: str, encoder_only: bool
) -> ml_collections.ConfigDict:
    """The config of the network that the tensors belong to.

    naming: one of NAMINGS. The bands get numbers, and no mean and std. Raises UserError
    if a size cannot be found, or if tensors contradict each other.
    """
    if method not in PUBLISHED:
        raise UserError(f"--method={method}, expected one of {', '.join(PUBLISHED)}")
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
    if int(model.embed_dim * model.mlp_ratio) < hidden:  # int() rounded down
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
    config.bands = tuple(f"band{i}" for i in range(channels))
    config.mean, config.std = (0.0,) * channels, (1.0,) * channels
    if num_groups:
        _group_config(file, config, [shape[1] for shape in shapes], encoder_only)
    if method == "scale_mae":
        _scale_config(file, config, encoder_only)
    else:
        loss = config.loss.reconstruction
        if num_groups:
            loss.norm_pix_loss = False  # SatMAE's setting for groups of bands
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
            "give the bands of each group, such as --channel_groups=((0, 1), (2,))"
        )
    groups = tuple(tuple(group) for group in groups)
    if tuple(map(len, groups)) != sizes:
        raise UserError(
            f"channel_groups={groups}, but {file.path} has groups of {sizes} bands: "
            "give groups of these sizes"
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
        model.position = "fixed"  # the official code sets every resolution to 1
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
            f"{file.path} predicts {8 * stride} px per patch, expected a multiple of "
            f"the patch size {model.patch_size}"
        )
    model.target_scale = scale
    size = config.views.size * scale
    low, high = options.get("band_config", (size / 32, 0))
    loss.high_frequency.cutoff = low / size
    # Only 224 has a special meaning in the official forward_loss.
    loss.low_frequency.through = 224 if high == 224 else 0
    absolute = bool(options.get("use_l1_loss", True))
    loss.high_frequency.absolute = absolute
    # The official weight applies only to the L1 loss.
    weight = float(options.get("l1_loss_weight", 1.0))
    loss.high_frequency.weight = weight if absolute else 1.0


def _image_size(file: OfficialFile, position: str, patch_size: int) -> int:
    """The side in pixels of the images in training."""
    if position not in file.tensors:
        if "image_size" in file.options:
            return file.options["image_size"]
        raise UserError(
            f"{file.path} lacks {position}, which would show the image size: give "
            "--image_size=PIXELS"
        )
    patches = file.shape(position, 3)[1] - 1
    side = round(patches**0.5)
    if side**2 != patches:
        raise UserError(
            f"{file.path}: {position} has {patches} patches, expected a square number"
        )
    size = side * patch_size
    if file.options.get("image_size", size) != size:
        raise UserError(
            f"image_size={file.options['image_size']}, but {position} in {file.path} "
            f"is for {size} px: give --image_size={size} or leave it out"
        )
    return size
