"""The trained encoder: in memory, in its folder, and as a callable."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from xsmae.bands import Bands
from xsmae.config import DTYPES
from xsmae.data.gsd import outside_training
from xsmae.errors import OutsideTrainingWarning, UserError
from xsmae.models.pooling import POOLINGS, pool
from xsmae.models.taps import tokens_after
from xsmae.models.vit import Encoder as Network
from xsmae.ops.attention.api import IMPLEMENTATIONS
from xsmae.process.files import atomic_write, write_json
from xsmae.weights.description import (
    check_network,
    describe_encoder,
    from_timm,
    new_network,
    no_encoder_in,
    read_description,
    to_timm,
)
from xsmae.weights.embedding import embed_all, open_images
from xsmae.weights.inputs import check_gsd, check_images, check_patches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Gsd = float | Sequence[float] | np.ndarray | None

# Fields of a description that do not change features.
# Older ones have a `scale`, 255 for 8-bit images, which has no effect.
NOT_IN_DIGEST = (
    "run", "licence", "data_licence", "gsd_range", "scale", "wavelengths",
)  # fmt: skip
# The meaning of an encoder.json without these fields: with or without, one digest.
IMPLIED = {"dtype": "uint8"}


class Encoder:
    """A trained encoder and its description: `encoder(images, gsd=...)` -> features.

    info: the content of its `encoder.json`. bands: the bands it reads. network: takes
    normalised images. dtype: `float32` or `bfloat16` for matrix products; features are
    always float32. attention: one of `IMPLEMENTATIONS`.
    """

    def __init__(
        self,
        weights: Network,
        info: Mapping[str, Any],
        *,
        dtype: str = "float32",
        attention: str = "xla",
        weights_digest: bytes | None = None,
    ):
        """Wrap the weights of any network with the architecture of `info`.

        weights_digest: SHA-256 of the file that the weights come from, if any.
        """
        _check_choice("dtype", dtype, DTYPES)
        _check_choice("attention", attention, IMPLEMENTATIONS)
        self.info, self.dtype, self.attention = dict(info), dtype, attention
        self.bands = Bands.of(info)
        self.network = check_network(info, dtype=dtype, attention=attention)
        nnx.update(self.network, nnx.state(weights))
        self._weights_digest = weights_digest
        self._warned = False
        graphdef, state = nnx.split(self.network)

        @functools.partial(jax.jit, static_argnames="block")
        def encode(state, images, gsd, block=None):
            network, images = nnx.merge(graphdef, state), self.bands.normalize(images)
            if block is None:
                return network(images, gsd=gsd).astype(jnp.float32)
            (tokens,) = tokens_after(network, images, [block - 1], gsd=gsd)
            return tokens.astype(jnp.float32)

        self._encode = functools.partial(encode, state)
        if attention not in ("xla", "auto"):  # these two work for every shape
            side = self.info["image_size"]
            like = jax.ShapeDtypeStruct((1, side, side, len(self.bands.names)), "f4")
            with _as_user_error():
                jax.eval_shape(self._encode, like, np.ones((1, 2), np.float32))

    @classmethod
    def random(cls, info: Mapping[str, Any], *, seed: int) -> Encoder:
        """An untrained encoder with the architecture of `info`."""
        described = describe_encoder(
            info["architecture"],
            image_size=info["image_size"],
            bands=Bands.of(info),
            run={"method": "none: random weights", "seed": seed},
        )
        return cls(new_network(info, seed=seed), described)

    def __repr__(self) -> str:
        shape = self.info["architecture"]
        return (
            f"Encoder({shape['embed_dim']} wide, {shape['depth']} deep, patch "
            f"{shape['patch_size']}, bands {', '.join(self.bands.names)})"
        )

    def __call__(
        self, images: np.ndarray, *, gsd: Gsd = None, pooling: str | None = None
    ) -> Float[Array, "batch width"]:
        """One feature vector per image.

        images: [batch, height, width, bands], uint8, or floating numbers in 0-1; for an
        encoder of rasters, floating numbers in its `units`. The sides are multiples of
        the patch size. gsd: metres per pixel, one number, [batch], or [batch, 2] as (y,
        x); needed if the position encoding reads it.
        pooling: `cls` or `mean` (of the patch tokens), by default encoder.json's.
        """
        pooling = self._pooling(pooling)
        return self.pool(self.tokens(images, gsd=gsd), pooling)

    def tokens(
        self, images: np.ndarray, *, gsd: Gsd = None, block: int | None = None
    ) -> Float[Array, "batch tokens width"]:
        """The class token, then one token per patch, row by row.

        block: 1 to the depth: the tokens of that block, without the final norm. None:
        those of the last block, after the final norm if the encoder has one.
        """
        depth = self.info["architecture"]["depth"]
        if block is not None and not 1 <= block <= depth:
            raise UserError(f"block={block}, expected 1 to {depth}")
        images = check_images(np.asarray(images), self.bands)
        check_patches(images, self.info["architecture"]["patch_size"])
        told = self._told(gsd, len(images))
        if told is not None:
            self._warn_outside(told)
        with _as_user_error():
            return self._encode(images, told, block=block)

    def pool(
        self, tokens: Float[Array, "batch tokens width"], pooling: str | None = None
    ) -> Float[Array, "batch width"]:
        """One vector per image from `tokens`, as `__call__` returns it."""
        return pool(tokens, self._pooling(pooling))

    def embed(
        self,
        images_or_paths: Any,
        gsd: Gsd = None,
        batch_size: int = 64,
        pooling: str | None = None,
        progress: bool = True,
    ) -> Float[np.ndarray, "n width"]:
        """One feature vector per image, for any number of images of any size.

        images_or_paths: an array [n, height, width, bands]; a list that may mix arrays,
        PIL images and file paths; or a source. The largest central square of each image
        is resized to the encoder's image size, as in evaluations. gsd: as in
        `__call__`, before resizing; not for a source, whose records have their own.
        progress: print progress to stderr every ten seconds. Raises UserError if an
        image cannot be used.
        """
        pooling = self._pooling(pooling)
        opened = open_images(images_or_paths, bands=self.bands)
        if opened.has_gsd and gsd is not None:
            raise UserError(
                f"gsd={gsd!r}, but the source's records have their own: leave it out"
            )
        told = None if opened.has_gsd else self._told(gsd, len(opened))
        return embed_all(
            lambda images, gsd: np.asarray(self(images, gsd=gsd, pooling=pooling)),
            opened,
            gsd=told,
            size=self.info["image_size"],
            bands=self.bands,
            batch_size=batch_size,
            progress=progress,
        )

    def save(self, directory: str | Path) -> None:
        """Write `encoder.safetensors` and `encoder.json` into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / "encoder.safetensors") as temporary:
            temporary.write_bytes(self._serialized())
        write_json(directory / "encoder.json", self.info)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of weights and description.

        Encoders with equal digests give equal features.
        """
        return self.digest_with()

    def digest_with(self, *more: bytes) -> str:
        """The digest of this encoder in the use that `more` describes."""
        told = {
            name: value
            for name, value in self.info.items()
            if name not in NOT_IN_DIGEST and (name, value) not in IMPLIED.items()
        }
        if self._weights_digest is None:
            self._weights_digest = hashlib.sha256(self._serialized()).digest()
        if self.dtype != "float32":
            more = (self.dtype.encode(), *more)
        described = json.dumps(told, sort_keys=True).encode()
        parts = [hashlib.sha256(part).digest() for part in (described, *more)]
        parts.insert(1, self._weights_digest)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def _serialized(self) -> bytes:
        grid = (self.info["image_size"] // self.network.patch_size,) * 2
        tensors = to_timm(self.network, self.info["architecture"], grid=grid)
        return save(tensors, metadata={"format": "pt"})

    def _pooling(self, pooling: str | None) -> str:
        pooling = pooling or self.info["pooling"]
        if pooling not in POOLINGS:
            raise UserError(f"pooling={pooling!r}, expected one of {POOLINGS}")
        return pooling

    def _told(self, gsd: Gsd, batch: int) -> np.ndarray | None:
        """`gsd` as [batch, 2]; None if the positions do not read it."""
        if self.info["architecture"]["position"] == "fixed":
            return None
        if gsd is None:
            raise UserError(
                "gsd is missing, but this encoder scales its positions by it: give "
                "gsd=METRES per pixel of the images as you pass them"
            )
        return check_gsd(gsd, batch)

    def _warn_outside(self, gsd: np.ndarray) -> None:
        """Warn once about GSDs outside the range of training."""
        if self._warned:
            return
        ends = gsd.min(), gsd.max()
        if outside_training(self.info, *ends):
            self._warned = True
            low, high = self.info["gsd_range"]
            given = " to ".join(f"{end:g}" for end in sorted(set(ends)))
            warnings.warn(
                f"the encoder was trained at {low:g} to {high:g} metres per pixel, but "
                f"got images of {given}: its features may be poor",
                OutsideTrainingWarning,
                stacklevel=4,
            )


def load_encoder(
    path: str | Path, dtype: str = "float32", attention: str = "xla"
) -> Encoder:
    """Load the encoder of `RUN`, `RUN/encoder` or `RUN/checkpoints/STEP`.

    dtype: `float32`, or `bfloat16`, which is faster on GPUs and TPUs, for matrix
    products. attention: `xla`, `pallas`, `cudnn`, or `auto`, the fastest for the
    device. Raises UserError if the folder has no encoder, or a damaged one.
    """
    path, execution = Path(path), {"dtype": dtype, "attention": attention}
    if path.parent.name == "checkpoints" and path.name.isdigit():
        # Imported here because it needs all that training needs.
        from xsmae.weights.from_checkpoint import read_checkpoint

        return Encoder(*read_checkpoint(path), **execution)
    if not (path / "encoder.json").exists():
        if not (path / "encoder" / "encoder.json").exists():
            raise UserError(no_encoder_in(path))
        path = path / "encoder"
    info = read_description(path / "encoder.json")
    try:
        tensors = load_file(path / "encoder.safetensors")
        with (path / "encoder.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    weights = check_network(info)
    from_timm(weights, info["architecture"], tensors)
    return Encoder(weights, info, weights_digest=digest, **execution)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}, expected one of {', '.join(known)}")


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """Turn the ValueError of an unsuitable attention into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
