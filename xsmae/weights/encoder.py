"""The encoder that is carried away: written in timm's names, loaded as a callable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xsmae.errors import UserError
from xsmae.models.build import EXECUTION, Config, build_encoder, channel_groups
from xsmae.models.position import patch_positions
from xsmae.models.vit import Encoder
from xsmae.process.files import atomic_write, write_json
from xsmae.weights.layouts import collect, encoder_weights, load

if TYPE_CHECKING:
    from jaxtyping import Array, Float


SCHEMA = 1
POOLINGS = ("cls", "mean")

# What of `config.model` goes into encoder.json, and what loading reads besides.
ARCHITECTURE = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_style",
    "norm_epsilon", "encoder_norm", "position", "reference_gsd",
)  # fmt: skip
GROUPS = ("channel_groups", "group_dim")  # SatMAE's
REQUIRED = ("architecture", "bands", "mean", "std", "pooling")


def to_timm(
    encoder: Encoder, model: Config, *, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The encoder's weights as timm's `VisionTransformer` names and shapes them.

    `pos_embed` is that of a `grid` at the reference GSD, zeros for the class token.
    With groups of bands the names are SatMAE's, and there is no `pos_embed`.
    """
    tensors = collect(encoder, encoder_weights(model))
    if not channel_groups(model):
        position = patch_positions(grid, encoder.embed_dim)
        position = jnp.pad(position, [(0, 0), (1, 0), (0, 0)])
        tensors["pos_embed"] = np.asarray(position)
    return tensors


def from_timm(
    encoder: Encoder, model: Config, tensors: Mapping[str, np.ndarray]
) -> None:
    """Put `to_timm`'s tensors into `encoder`, in place.

    Raises UserError with the names that are missing, extra or of another shape.
    """
    tensors = {k: v for k, v in tensors.items() if k != "pos_embed"}  # is computed
    load(encoder, encoder_weights(model), tensors)


def write_encoder(
    directory: Path,
    encoder: Encoder,
    *,
    model: Mapping[str, Any],
    image_size: int,
    bands: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    run: Mapping[str, Any],
) -> None:
    """Write `encoder.safetensors` and `encoder.json` into `directory`.

    `model` is `config.model`; `run` says what run the encoder comes from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    grid = (image_size // encoder.patch_size,) * 2
    tensors = to_timm(encoder, model, grid=grid)
    with atomic_write(directory / "encoder.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(
        directory / "encoder.json",
        {
            "schema": SCHEMA,
            "architecture": {
                name: model[name] for name in (*ARCHITECTURE, *GROUPS) if name in model
            },
            "image_size": image_size,
            "bands": list(bands),
            "units": "digital numbers 0-255 divided by 255",
            "mean": list(mean),
            "std": list(std),
            "gsd_units": "metres per pixel",
            "pooling": "mean",
            "licence": "the weights are their maker's; the data's licence applies",
            "run": dict(run),
        },
    )


class LoadedEncoder:
    """An encoder with all that it must be told: `encoder(images, gsd=...)` -> features.

    info: the content of `encoder.json`. encoder: the network, of normalised images.
    """

    def __init__(self, encoder: Encoder, info: Mapping[str, Any]):
        self.info = info
        self.encoder = encoder
        graphdef, state = nnx.split(encoder)
        mean, std = (jnp.array(info[name], jnp.float32) for name in ("mean", "std"))

        @jax.jit
        def encode(state, images, gsd):
            return nnx.merge(graphdef, state)((images - mean) / std, gsd=gsd)

        self._encode = lambda images, gsd: encode(state, images, gsd)

    def __call__(
        self,
        images: np.ndarray,
        *,
        gsd: float | np.ndarray | None = None,
        pooling: str | None = None,
    ) -> Float[Array, "batch width"]:
        """One feature vector per image.

        images: [batch, height, width, bands], uint8, or floating numbers in 0-1; sides
        that are multiples of the patch size. gsd: metres per pixel, one for all,
        [batch], or [batch, 2] as (y, x); needed where the position encoding reads it.
        pooling: `cls` or `mean` (of the patch tokens), by default encoder.json's.
        """
        pooling = pooling or self.info["pooling"]
        if pooling not in POOLINGS:
            raise UserError(f"pooling={pooling!r}, expected one of {POOLINGS}")
        tokens = self.tokens(images, gsd=gsd)
        return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(axis=1)

    def tokens(
        self, images: np.ndarray, *, gsd: float | np.ndarray | None = None
    ) -> Float[Array, "batch tokens width"]:
        """The class token and then one token per patch, row by row."""
        images = self._check_images(np.asarray(images))
        return self._encode(images, self._check_gsd(gsd, len(images)))

    def _check_images(self, images: np.ndarray) -> np.ndarray:
        bands, patch = self.info["bands"], self.info["architecture"]["patch_size"]
        if images.ndim != 4 or images.shape[-1] != len(bands):
            raise UserError(
                f"images of shape {images.shape}, expected [batch, height, width, "
                f"{len(bands)}] with the bands {', '.join(bands)} in this order"
            )
        if not images.size:
            raise UserError(f"images of shape {images.shape}, expected one or more")
        if images.shape[1] % patch or images.shape[2] % patch:
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} px, expected multiples "
                f"of the patch size {patch}: resize or crop them"
            )
        if images.dtype == np.uint8:
            return images.astype(np.float32) / 255
        if not np.issubdtype(images.dtype, np.floating):
            raise UserError(
                f"images of dtype {images.dtype}, expected uint8 (0-255) or floating "
                "numbers in 0-1"
            )
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"images with values from {low:g} to {high:g}, expected uint8 (0-255) "
                "or floating numbers in 0-1, not normalised"
            )
        return images.astype(np.float32)

    def _check_gsd(self, gsd, batch: int) -> np.ndarray | None:
        if self.info["architecture"]["position"] == "fixed":
            return None
        if gsd is None:
            raise UserError(
                "gsd is missing: this encoder's positions are scaled by it; give "
                "metres per pixel of the images as they are passed, gsd=..."
            )
        try:
            gsd = np.asarray(gsd, np.float32)
        except (TypeError, ValueError):
            raise UserError(f"gsd={gsd!r}, expected metres per pixel above 0") from None
        wrong = gsd[~(np.isfinite(gsd) & (gsd > 0))]
        if wrong.size:
            raise UserError(f"gsd={wrong[0]:g}, expected metres per pixel above 0")
        try:
            per_axis = gsd[:, None] if gsd.ndim == 1 else gsd
            return np.broadcast_to(per_axis, (batch, 2))
        except ValueError:
            raise UserError(
                f"gsd of shape {gsd.shape} for {batch} images, expected one number, "
                f"[{batch}] or [{batch}, 2]"
            ) from None


def load_encoder(directory: str | Path) -> LoadedEncoder:
    """The encoder that a run left in `<workdir>/encoder/`; the workdir is taken too.

    Raises UserError where the folder or its files are not what they should be.
    """
    directory = Path(directory)
    if not (directory / "encoder.json").exists():
        if not (directory / "encoder" / "encoder.json").exists():
            raise UserError(
                f"{directory} holds no encoder.json: give the folder `encoder` that a "
                "finished run leaves in its workdir"
            )
        directory = directory / "encoder"
    path = directory / "encoder.json"
    try:
        info = json.loads(path.read_text())
        tensors = load_file(directory / "encoder.safetensors")
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{directory} cannot be read: {error}") from None
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema!r}, expected {SCHEMA}: it was written by "
            "another version of xsmae"
        )
    missing = [name for name in REQUIRED if name not in info]
    missing += [
        n for n in ARCHITECTURE if n not in info.get("architecture", ARCHITECTURE)
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(map(repr, missing))}")
    channels = len(info["bands"])
    for name in ("mean", "std"):
        if len(info[name]) != channels:
            raise UserError(
                f"{path} has {len(info[name])} {name}, expected {channels}, one a band"
            )
    try:
        encoder = check_network(info)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} does not fit together: {error}") from None
    from_timm(encoder, info["architecture"], tensors)
    return LoadedEncoder(encoder, info)


def check_network(info: Mapping[str, Any]) -> Encoder:
    """The shapes alone, without the time that random weights take.

    Raises what the network does where the values of `info` do not fit together.
    """
    return nnx.eval_shape(lambda: _network(info))


def _network(info: Mapping[str, Any], *, seed: int = 0) -> Encoder:
    """A new encoder as an `encoder.json` describes it."""
    model = {**info["architecture"], **EXECUTION}
    return build_encoder(model, channels=len(info["bands"]), rngs=nnx.Rngs(seed))


def write_random_encoder(
    directory: Path, info: Mapping[str, Any], *, seed: int
) -> None:
    """Write an encoder as `info` (an `encoder.json`) describes it, before training."""
    write_encoder(
        directory,
        _network(info, seed=seed),
        model=info["architecture"],
        image_size=info["image_size"],
        bands=tuple(info["bands"]),
        mean=tuple(info["mean"]),
        std=tuple(info["std"]),
        run={"method": "none: random weights", "seed": seed},
    )
