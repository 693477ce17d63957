"""Maps our weights to the names and layouts of official checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from xsmae.errors import UserError
from xsmae.models.build import Config, channel_groups

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Converts an official tensor to our array, and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _einops(theirs: str, ours: str, **sizes: int) -> Conversion:
    return Conversion(
        functools.partial(rearrange, pattern=f"{theirs} -> {ours}", **sizes),
        functools.partial(rearrange, pattern=f"{ours} -> {theirs}", **sizes),
    )


SAME = Conversion(lambda x: x, lambda x: x)
LINEAR = Conversion(lambda x: x.T, lambda x: x.T)
CONV = _einops("o i h w", "h w i o")
MIX = _einops("o i 1 1", "i o")
CONV_TRANSPOSE = _einops("i o h w", "i h w o")


@dataclasses.dataclass(frozen=True)
class Weight:
    """An official tensor's name, and its place in our arrays.

    path: our array in the model's state. layer: index on the first axis, for stacked
    blocks. third: which third of the last axis, for q, k and v.
    """

    name: str
    path: Path
    conversion: Conversion = SAME
    layer: int | None = None
    third: int | None = None

    def within(self, array: np.ndarray) -> np.ndarray:
        """A view of the part of our array that the tensor fills."""
        if self.layer is not None:
            array = array[self.layer]
        if self.third is not None:
            array = np.split(array, 3, axis=-1)[self.third]
        return array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The official tensor from our array, or from its gradient."""
        return self.conversion.theirs(self.within(array))


def load(
    model: nnx.Module,
    weights: list[Weight],
    tensors: Mapping[str, np.ndarray],
    *,
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Put official tensors into `model`, in place.

    others: shapes of tensors that the file must have but the model does not. Raises
    UserError with every name that is missing, extra or has another shape.
    """
    arrays = {
        path: np.zeros(leaf.shape, np.float32) for path, leaf in leaves(model).items()
    }
    expected = {w.name: w.theirs(arrays[w.path]).shape for w in weights}
    expected |= others or {}
    wrong = sorted(
        f"{name}: expected {expected.get(name, 'nothing')}, found "
        f"{tensors[name].shape if name in tensors else 'nothing'}"
        for name in expected.keys() | tensors.keys()
        if name not in tensors or expected.get(name) != tensors[name].shape
    )
    if wrong:
        raise UserError(f"the weights do not fit the network: {'; '.join(wrong)}")
    for w in weights:
        tensor = np.asarray(tensors[w.name], np.float32)
        w.within(arrays[w.path])[...] = w.conversion.ours(tensor)
    unfilled = arrays.keys() - {w.path for w in weights}
    if unfilled:
        raise UserError(f"no official name for {sorted(map(str, unfilled))}")
    state = nnx.state(model)
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    new = [jnp.asarray(arrays[_path(path)]) for path, _ in paths]
    nnx.update(model, jax.tree_util.tree_unflatten(tree, new))


def collect(model: nnx.Module, weights: list[Weight]) -> dict[str, np.ndarray]:
    """The official tensors of `model`, contiguous, in float32."""
    arrays = {path: np.asarray(leaf) for path, leaf in leaves(model).items()}
    return {
        # safetensors ignores strides, so transposed views must be copied.
        w.name: np.ascontiguousarray(w.theirs(arrays[w.path]), np.float32)
        for w in weights
    }


def leaves(tree: nnx.Module | nnx.State) -> dict[Path, jax.Array]:
    """The arrays of a model or a state, by path."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return {_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}


def _path(path) -> Path:
    return tuple(key.key for key in path if hasattr(key, "key"))


def encoder_weights(
    model: Config, *, naming: str = "timm", root: Path = ()
) -> list[Weight]:
    """The encoder's weights; with groups of bands, by SatMAE's names."""
    names = NAMINGS[naming]
    return list(_encoder(model, root, names))


def weights_of(model: Config, *, method: str, naming: str = "timm") -> list[Weight]:
    """All weights of a method's network, by the names of its official checkpoints."""
    names, groups = NAMINGS[naming], channel_groups(model)
    root = ("mae",) if method == "cross_scale_mae" else ()
    weights = [
        *_encoder(model, (*root, "encoder"), names),
        *_decoder(model, (*root, "decoder"), names),
    ]
    head = (*root, "decoder", "head")
    if method == "scale_mae":
        weights += _scale_head(model, head)
    elif groups:
        weights += _group_head(model, groups, head)
    else:
        weights += _linear("decoder_pred", (*head, "pred"))
    if method == "cross_scale_mae":
        weights += _predictor(("predictor",))
    return weights


def timm_block(theirs: str, ours: Path) -> Iterator[Weight]:
    """A block of timm's VisionTransformer."""
    for name, part in (("attn.qkv", "qkv"), ("attn.proj", "proj")):
        yield from _linear(f"{theirs}.{name}", (*ours, part))
    for name, part in (("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
        yield from _linear(f"{theirs}.{name}", (*ours, part))
    for name in ("norm1", "norm2"):
        yield from _norm(f"{theirs}.{name}", (*ours, name))


def xformers_block(theirs: str, ours: Path) -> Iterator[Weight]:
    """A block of xFormers, by the names in the released Cross-Scale MAE weights."""
    attention = f"{theirs}.wrap_att.sublayer.layer"
    mlp = f"{theirs}.wrap_ff.sublayer.layer.mlp"
    for third, letter in enumerate("qkv"):
        name = f"{attention}.in_proj_container.{letter}_proj"
        yield from _linear(name, (*ours, "qkv"), third=third)
    yield from _linear(f"{attention}.proj", (*ours, "proj"))
    yield from _linear(f"{mlp}.0", (*ours, "fc1"))
    yield from _linear(f"{mlp}.3", (*ours, "fc2"))
    yield from _norm(f"{theirs}.wrap_att.norm", (*ours, "norm1"))
    yield from _norm(f"{theirs}.wrap_ff.norm", (*ours, "norm2"))


def huggingface_block(theirs: str, ours: Path) -> Iterator[Weight]:
    """A block of Hugging Face's ViT, by the names in its published files."""
    for third, name in enumerate(("query", "key", "value")):
        name = f"{theirs}.attention.attention.{name}"
        yield from _linear(name, (*ours, "qkv"), third=third)
    yield from _linear(f"{theirs}.attention.output.dense", (*ours, "proj"))
    yield from _linear(f"{theirs}.intermediate.dense", (*ours, "fc1"))
    yield from _linear(f"{theirs}.output.dense", (*ours, "fc2"))
    yield from _norm(f"{theirs}.layernorm_before", (*ours, "norm1"))
    yield from _norm(f"{theirs}.layernorm_after", (*ours, "norm2"))


def _linear(name: str, path: Path, third: int | None = None) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (*path, "kernel"), LINEAR, third=third)
    yield Weight(f"{name}.bias", (*path, "bias"), third=third)


def _norm(name: str, path: Path) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (*path, "scale"))
    yield Weight(f"{name}.bias", (*path, "bias"))


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names that a family of checkpoints uses."""

    block: Callable[[str, Path], Iterator[Weight]]
    blocks: str
    norm: str
    position: str
    decoder_blocks: str = ""
    cls_token: str = "cls_token"
    patch_embed: str = "patch_embed.proj"


NAMINGS = {
    # MAE, SatMAE, Scale-MAE; an encoder alone is timm's VisionTransformer.
    "timm": Naming(
        block=timm_block,
        blocks="blocks.{}",
        norm="norm",
        position="pos_embed",
        decoder_blocks="decoder_blocks.{}",
    ),
    "cross_scale_timm": Naming(
        block=timm_block,
        blocks="encoder.{}",
        norm="encoder_norm",
        position="encoder_pos_embed",
        decoder_blocks="decoder.{}",
    ),
    "cross_scale_xformers": Naming(
        block=xformers_block,
        blocks="encoder.encoders.{}",
        norm="encoder_norm",
        position="encoder_pos_embed",
        decoder_blocks="decoder.encoders.{}",
    ),
    # Only the encoder.
    "huggingface": Naming(
        block=huggingface_block,
        blocks="encoder.layer.{}",
        norm="layernorm",
        position="embeddings.position_embeddings",
        cls_token="embeddings.cls_token",
        patch_embed="embeddings.patch_embeddings.projection",
    ),
}


def _convolution(name: str, path: Path, conversion: Conversion) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (*path, "kernel"), conversion)
    yield Weight(f"{name}.bias", (*path, "bias"))


def _stack(block, name: str, path: Path, depth: int) -> Iterator[Weight]:
    for layer in range(depth):
        for weight in block(name.format(layer), path):
            yield dataclasses.replace(weight, layer=layer)


def _encoder(model, root, names: Naming) -> Iterator[Weight]:
    yield Weight(names.cls_token, (*root, "cls_token"))
    groups = channel_groups(model)
    embeds = [(f"patch_embed.{i}.proj", ("groups", i)) for i in range(len(groups))]
    sizes = {"p": model["patch_size"], "q": model["patch_size"]}
    patch = _einops("d c p q", "(p q c) d", **sizes)
    for name, path in embeds or [(names.patch_embed, ())]:
        yield from _convolution(name, (*root, "patch_embed", *path, "proj"), patch)
    path = (*root, "blocks")
    yield from _stack(names.block, names.blocks, path, model["depth"])
    yield from _norm(names.norm, (*root, "norm"))


def _decoder(model, root, names: Naming) -> Iterator[Weight]:
    yield Weight("mask_token", (*root, "mask_token"))
    yield from _linear("decoder_embed", (*root, "embed"))
    path = (*root, "blocks")
    yield from _stack(names.block, names.decoder_blocks, path, model["decoder_depth"])
    yield from _norm("decoder_norm", (*root, "norm"))


def _group_head(model, groups, root) -> Iterator[Weight]:
    sizes = {"p": model["patch_size"], "q": model["patch_size"]}
    kernel = _einops("(c p q) d", "d (p q c)", **sizes)
    bias = _einops("(c p q)", "(p q c)", **sizes)
    for i in range(len(groups)):
        path = (*root, "groups", i, "pred")
        yield Weight(f"decoder_pred.{i}.weight", (*path, "kernel"), kernel)
        yield Weight(f"decoder_pred.{i}.bias", (*path, "bias"), bias)


def _scale_head(model, root) -> Iterator[Weight]:
    pyramid = (*root, "pyramid")
    yield from _convolution("fpn.fpn2.0", (*pyramid, "double"), CONV_TRANSPOSE)
    # The official `fpn1` is a sequence. `progressive` networks lack its first step.
    at = 0
    if not model["progressive"]:
        yield from _convolution("fpn.fpn1.0", (*pyramid, "first"), CONV_TRANSPOSE)
        at = 1
    yield from _norm(f"fpn.fpn1.{at}.ln", (*pyramid, "norm"))
    name = f"fpn.fpn1.{at + 2}"
    yield from _convolution(name, (*pyramid, "second"), CONV_TRANSPOSE)
    heads = {"fcn_low": "low", "fcn_high": "high"}
    if not model["independent_heads"]:
        heads = {"fcn": "low"}
    for theirs, ours in heads.items():
        path = (*root, ours)
        yield from _convolution(f"{theirs}.proj", (*path, "proj"), MIX)
        for i in range(model["head_depth"]):
            block, at = f"{theirs}.conv_blocks.{i}", (*path, "blocks", i)
            yield from _convolution(f"{block}.convs.1", (*at, "grouped"), CONV)
            yield from _convolution(f"{block}.convs.3", (*at, "mix"), MIX)
            yield from _convolution(f"{block}.residual", (*at, "residual"), MIX)
        pred = f"{theirs}.pred"
        yield from _norm(f"{pred}.0.ln", (*path, "norm"))
        yield from _convolution(f"{pred}.1", (*path, "up1"), CONV_TRANSPOSE)
        yield from _convolution(f"{pred}.3", (*path, "grouped"), CONV)
        yield from _convolution(f"{pred}.5", (*path, "mix"), MIX)
        yield from _convolution(f"{pred}.7", (*path, "up2"), CONV_TRANSPOSE)


def _predictor(root) -> Iterator[Weight]:
    yield from _linear("predictor.0", (*root, "fc1"))
    norm = (*root, "norm")
    yield from _norm("predictor.1", norm)
    yield Weight("predictor.1.running_mean", (*norm, "mean"))
    yield Weight("predictor.1.running_var", (*norm, "var"))
    yield from _linear("predictor.3", (*root, "fc2"))
