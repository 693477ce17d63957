"""A trained segmentation head in memory, and any head from its folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.config import DTYPES
from xsmae.errors import UserError
from xsmae.models.pixel_linear import PixelLinear
from xsmae.models.taps import as_map, tapped_blocks, token_maps
from xsmae.models.upernet import UperNet, head_channels, norm_for
from xsmae.ops import resize
from xsmae.train_state import TrainState
from xsmae.weights import classifier, head_files
from xsmae.weights.description import check_network
from xsmae.weights.encoder import Encoder
from xsmae.weights.head_files import is_whole
from xsmae.weights.inputs import check_gsd, check_images, check_patches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from xsmae.weights.encoder import Gsd

TASK = "segment"
KINDS = ("upernet", "linear")
MAX_CLASSES = 255  # 255 itself is a pixel without a class
REQUIRED = (
    "kind", "classes", "crop", "overlap", "architecture", "encoder", "weights",
    "training",
)  # fmt: skip


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
        names = ("kind", "classes", "crop", "overlap", "architecture")
        return head_files.digest_of(self.info, names)


def _upernet_scores(network, model, images, gsd, *, blocks):
    taps = token_maps(network, images, blocks, gsd=gsd)
    return resize.bilinear(model(taps, training=False), images.shape[1:3])


def _linear_scores(network, model, images, gsd):
    tokens = network(images, gsd=gsd).astype(jnp.float32)
    features = as_map(tokens, network.grid(*images.shape[1:3]))
    return model(features, size=images.shape[1:3], training=False)


def save_head(
    folder: str | Path,
    encoder: head_files.Trained,
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
    info = encoder.info
    if trained:
        info = {**info, "run": {**info.get("run", {}), "trained_with_head": kind}}
    fields = {
        "task": TASK,
        "kind": kind,
        "classes": [
            {"name": name, **({"color": list(colours[i])} if colours else {})}
            for i, name in enumerate(classes)
        ],
        "crop": recipe["crop"],
        "overlap": recipe["overlap"],
        "architecture": architecture,
        "training": dict(training),
    }
    tensors = head_files.tensors_of(params, batch_stats)
    head_files.write_head(folder, Encoder(network, info), tensors, fields)


def load_head(folder: str | Path) -> Head | classifier.Classifier:
    """Load the head of a folder, or of the folder of a result, with its encoder.

    It is a `Head`, which segments, or a `Classifier`, which labels whole images. Raises
    UserError if the folder has no head, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / "head.json").exists() and (folder / "head/head.json").exists():
        folder = folder / "head"
    path = folder / "head.json"
    info = head_files.read_description(path)
    if info["task"] == classifier.TASK:
        return classifier.read_classifier(folder, info)
    head_files.check_fields(path, info, REQUIRED, _checks)
    encoder, tensors = head_files.read_head(folder, info)
    model = head_files.build(folder, lambda: _new(info, encoder))
    head_files.fill(model, tensors, folder)
    return Head(model, head_files.in_dtype(encoder, info), info)


def _new(info: Mapping[str, Any], encoder: Encoder) -> UperNet | PixelLinear:
    """A module of the head's architecture."""
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
    return new(rngs=nnx.Rngs(0))


def _checks(info: Mapping[str, Any]) -> dict[str, bool]:
    """For each field of a `head.json`, whether a head can have its value."""
    crop, overlap = info["crop"], info["overlap"]
    return {
        "kind": info["kind"] in KINDS,
        "classes": _are_classes(info["classes"]),
        "crop": is_whole(crop, 1),
        "overlap": is_whole(overlap, 0) and is_whole(crop, overlap + 1),
        "architecture": isinstance(info["architecture"], dict),
    }


def _are_classes(entries: Any) -> bool:
    if not head_files.are_named(entries) or len(entries) > MAX_CLASSES:
        return False
    colours = [entry["color"] for entry in entries if "color" in entry]
    return len(colours) in (0, len(entries)) and all(
        isinstance(c, list) and len(c) == 3 and all(is_whole(v, 0, 255) for v in c)
        for c in colours
    )
