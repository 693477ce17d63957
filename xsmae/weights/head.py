"""A trained segmentation head: in memory, and in a folder with its encoder.

HEAD/head.safetensors   the weights of the head
HEAD/head.json          what it is: classes, crop, digests, how it was trained
HEAD/encoder/           the encoder that it reads, frozen or trained with it
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xsmae.config import DTYPES
from xsmae.errors import UserError
from xsmae.models.pixel_linear import PixelLinear
from xsmae.models.taps import as_map, tapped_blocks, token_maps
from xsmae.models.upernet import UperNet, head_channels, norm_for
from xsmae.models.vit import Encoder as Network
from xsmae.ops import resize
from xsmae.process.files import atomic_write, write_json
from xsmae.train_state import TrainState
from xsmae.weights.description import check_network
from xsmae.weights.encoder import Encoder, load_encoder
from xsmae.weights.inputs import check_gsd, check_images, check_patches
from xsmae.weights.layouts import leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from xsmae.weights.encoder import Gsd

SCHEMA, TASK = 1, "segment"
KINDS = ("upernet", "linear")
MAX_CLASSES = 255  # 255 itself is a pixel without a class
REQUIRED = (
    "kind", "classes", "crop", "overlap", "architecture", "encoder", "weights",
    "training",
)  # fmt: skip


class Trained(Protocol):
    """What `save_head` needs of an encoder: an `Encoder`, or one of an evaluation."""

    info: Mapping[str, Any]
    network: Network


class Head:
    """A trained head and its encoder: `head.predict(images, gsd=...)` -> scores.

    info: the content of its `head.json`. classes: names. colours: red, green and blue
    (0-255) of each class, () if there are none. encoder: the one that it reads. crop:
    the side of the windows that it was trained on. overlap: of neighbouring windows.
    """

    def __init__(
        self, model: UperNet | PixelLinear, encoder: Encoder, info: Mapping[str, Any]
    ):
        self.info, self.encoder = dict(info), encoder
        self.classes = tuple(entry["name"] for entry in info["classes"])
        colours = [entry["color"] for entry in info["classes"] if "color" in entry]
        self.colours = tuple(map(tuple, colours))
        self.crop, self.overlap = info["crop"], info["overlap"]
        dense = _linear_scores
        if info["kind"] == "upernet":
            blocks = tapped_blocks(encoder.info["architecture"]["depth"])
            dense = functools.partial(_upernet_scores, blocks=blocks)
        graphs, states = zip(*map(nnx.split, (encoder.network, model)), strict=True)

        @jax.jit
        def scores(states, images, gsd):
            pair = [nnx.merge(*part) for part in zip(graphs, states, strict=True)]
            return dense(*pair, encoder.bands.normalize(images), gsd)

        self._scores = functools.partial(scores, states)

    def __repr__(self) -> str:
        return f"Head({self.info['kind']}, classes {', '.join(self.classes)})"

    def predict(
        self, images: np.ndarray, gsd: Gsd = None
    ) -> Float[Array, "batch height width classes"]:
        """Scores of every pixel; the class of a pixel has the highest.

        images: [batch, height, width, bands], as `Encoder` takes them. gsd: metres per
        pixel, one number, [batch], or [batch, 2] as (y, x); needed if the encoder reads
        it. Heads are at their best on images of `crop` pixels.
        """
        images = check_images(np.asarray(images), self.encoder.bands)
        shape = self.encoder.info["architecture"]
        check_patches(images, shape["patch_size"])
        if self.info["kind"] == "upernet" and min(images.shape[1:3]) < (
            2 * shape["patch_size"]
        ):
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} px, expected two "
                f"patches of {shape['patch_size']} px per side: give larger images"
            )
        if shape["position"] == "fixed":
            return self._scores(images, None)
        if gsd is None:
            raise UserError("gsd is missing: give gsd=METRES per pixel of the images")
        return self._scores(images, check_gsd(gsd, len(images)))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; heads with equal digests give equal scores."""
        names = ("kind", "classes", "crop", "overlap", "architecture", "encoder")
        told = {name: self.info[name] for name in (*names, "weights")}
        told = json.dumps(told, sort_keys=True).encode()
        return hashlib.sha256(told).hexdigest()[:16]


def _upernet_scores(network, model, images, gsd, *, blocks):
    taps = token_maps(network, images, blocks, gsd=gsd)
    return resize.bilinear(model(taps, training=False), images.shape[1:3])


def _linear_scores(network, model, images, gsd):
    tokens = network(images, gsd=gsd).astype(jnp.float32)
    features = as_map(tokens, network.grid(*images.shape[1:3]))
    return model(features, size=images.shape[1:3], training=False)


def save_head(
    folder: str | Path,
    encoder: Trained,
    state: TrainState,
    *,
    kind: str,
    classes: Sequence[str],
    colours: Sequence[Sequence[int]] = (),
    recipe: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a trained head and its encoder.

    encoder: the one that the training got. state: the trained state, of
    `segment.create_learner` (kind `upernet`) or `segment_frozen.fit_linear` (kind
    `linear`); if the encoder was trained, it is in the state. colours: one for each
    class, or none. recipe: of the training. training: what else a reader should know of
    it, such as the protocol and the digests of the encoder and the data; JSON.
    """
    folder = Path(folder)
    params, batch_stats = state.params, state.batch_stats
    trained = kind == "upernet" and "encoder" in params
    network = encoder.network
    if trained:
        network = check_network(encoder.info)
        nnx.update(network, params["encoder"])
    if kind == "upernet":
        params, batch_stats = params["head"], batch_stats.get("head", {})
        width = encoder.info["architecture"]["embed_dim"]
        architecture = {
            "norm": norm_for(recipe["batch_size"]),
            "tap_norm": not trained,
            "channels": recipe["channels"] or head_channels(width),
            "dtype": recipe["dtype"],
        }
    else:
        architecture = {"epsilon": recipe["batch_norm_epsilon"]}
    found = leaves(nnx.State(params)) | leaves(nnx.State(batch_stats))
    weights = save({_name(path): np.asarray(x) for path, x in found.items()})
    info = encoder.info
    if trained:
        info = {**info, "run": {**info.get("run", {}), "trained_with_head": kind}}
    kept = Encoder(network, info)
    kept.save(folder / "encoder")
    with atomic_write(folder / "head.safetensors") as temporary:
        temporary.write_bytes(weights)
    content = {
        "schema": SCHEMA,
        "task": TASK,
        "kind": kind,
        "classes": [
            {"name": name, **({"color": list(colours[i])} if colours else {})}
            for i, name in enumerate(classes)
        ],
        "crop": recipe["crop"],
        "overlap": recipe["overlap"],
        "architecture": architecture,
        "encoder": kept.digest,
        "weights": hashlib.sha256(weights).hexdigest(),
        "training": dict(training),
    }
    # Last: until then the digests do not match, and the folder is refused.
    write_json(folder / "head.json", content)


def load_head(folder: str | Path) -> Head:
    """Load the segmentation head of a folder, with its encoder.

    Raises UserError if the folder has no head, or a damaged one.
    """
    folder = Path(folder)
    info = _read_description(folder / "head.json")
    encoder = load_encoder(folder / "encoder")
    if encoder.digest != info["encoder"]:
        raise UserError(
            f"{folder}/encoder has the digest {encoder.digest}, expected "
            f"{info['encoder']}: it is not the encoder of this head; restore it"
        )
    try:
        content = (folder / "head.safetensors").read_bytes()
        tensors = load(content)
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{folder}/head.safetensors cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != info["weights"]:
        raise UserError(
            f"{folder}/head.safetensors is damaged, or of another head than head.json: "
            "restore it"
        )
    try:
        model = _build(info, encoder)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/head.json is inconsistent: {reason}") from None
    _fill(model, tensors, folder)
    dtype = info["architecture"].get("dtype", "float32")
    if dtype != encoder.dtype:
        encoder = Encoder(encoder.network, encoder.info, dtype=dtype)
    return Head(model, encoder, info)


def _build(info: Mapping[str, Any], encoder: Encoder) -> UperNet | PixelLinear:
    """The head's module, with shapes only."""
    options = dict(info["architecture"])
    width, number = encoder.network.embed_dim, len(info["classes"])
    if info["kind"] == "linear":
        new = functools.partial(
            PixelLinear, width, number, momentum=0.0, head_std=0.0, **options
        )
    else:
        dtype = options.pop("dtype", None)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
        dtype = jnp.dtype(dtype)
        new = functools.partial(UperNet, width, number, dtype=dtype, **options)
    return nnx.eval_shape(lambda: new(rngs=nnx.Rngs(0)))


def _fill(model: nnx.Module, tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """Put the tensors of a file into `model`, in place."""
    expected = {_name(path): leaf.shape for path, leaf in leaves(model).items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{folder}/head.safetensors does not fit head.json: {name} expected "
                f"{expected.get(name, 'nothing')}, found {shapes.get(name, 'nothing')}"
            )
    state = nnx.state(model)
    paths = [_name(path) for path in leaves(state)]
    tree = jax.tree.structure(state)
    new = [jnp.asarray(tensors[path]) for path in paths]
    nnx.update(model, jax.tree.unflatten(tree, new))


def _name(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _read_description(path: Path) -> dict[str, Any]:
    """The content of a `head.json`; UserError if incomplete or inconsistent."""
    if not path.exists():
        raise UserError(
            f"{path.parent} has no head.json: give the folder of a segmentation head"
        )
    try:
        info = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = info if isinstance(info, dict) else {}
    for name, expected in (("schema", SCHEMA), ("task", TASK)):
        if found.get(name) != expected:
            raise UserError(
                f"{path} has {name}={found.get(name)!r}, expected {expected!r}: use "
                "the version of xsmae that wrote it, or give another head"
            )
    missing = [name for name in REQUIRED if name not in info]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: restore the file")
    wrong = [
        name
        for name, good in (
            ("kind", info["kind"] in KINDS),
            ("classes", _are_classes(info["classes"])),
            ("crop", _is_whole(info["crop"], 1)),
            ("overlap", _is_whole(info["overlap"], 0)),
            ("architecture", isinstance(info["architecture"], dict)),
        )
        if not good
    ]
    if not wrong and info["overlap"] >= info["crop"]:
        wrong = ["overlap"]
    if wrong:
        raise UserError(
            f"{path} has {wrong[0]}={info[wrong[0]]!r}, which no head has: restore the "
            "file"
        )
    return info


def _is_whole(value: Any, low: int, high: float = float("inf")) -> bool:
    return type(value) is int and low <= value <= high


def _are_classes(entries: Any) -> bool:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_CLASSES:
        return False
    if not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in entries):
        return False
    colours = [entry["color"] for entry in entries if "color" in entry]
    return len(colours) in (0, len(entries)) and all(
        isinstance(c, list) and len(c) == 3 and all(_is_whole(v, 0, 255) for v in c)
        for c in colours
    )
