"""Cross-scale distillation: coarse views of the same ground learn from the fine one."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from xsmae.models.mae import MAE, EncodedViews, MAEOutput, Views
from xsmae.models.masking import valid_patches
from xsmae.models.vit import Encoder, Linear
from xsmae.ops import resize
from xsmae.ops.gelu import gelu

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

TEACHERS = ("view1", "ema")
# Uniform numbers that place the box of a coarse view: area, top, left.
NUMBERS_PER_BOX = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleDistillOutput(MAEOutput):
    """The outputs in addition to those of the MAE, which are of view 1 alone.

    embedding: [batch, 2, dim], the mean patch token of views 1 and 2.
    coarse: [batch, coarse, dim], the same of each coarse view.
    target: [batch, dim], what the coarse views shall give; it gets no gradient.
    coarse_patches, target_patches, counts: for each coarse view its predicted patches,
        the teacher's at the same ground, and the part of each patch that it saw.
    """

    embedding: Float[Array, "batch two dim"]
    coarse: Float[Array, "batch coarse dim"]
    target: Float[Array, "batch dim"]
    coarse_patches: tuple[Float[Array, "batch patches dim"], ...]
    target_patches: tuple[Float[Array, "batch patches dim"], ...]
    counts: tuple[Float[Array, "batch patches"], ...]


@dataclasses.dataclass(frozen=True)
class CoarseViews:
    """The coarse views: the side of each in pixels, and the area of their boxes.

    area: the smallest and largest part of view 1's area that a coarse view shows. (1,
    1): all of it.
    """

    sides: tuple[int, ...]
    area: tuple[float, float] = (1.0, 1.0)

    def boxes(
        self, uniform: Float[Array, "batch numbers"], size: tuple[int, int]
    ) -> list[Float[Array, "batch 4"]]:
        """A box for each coarse view, in fractions of a view 1 of `size` pixels.

        Areas are log-uniform. A box has at least as many pixels as its coarse view, so
        that no view is enlarged.
        """
        low, high = (math.log(part) for part in self.area)
        found = []
        for index, side in enumerate(self.sides):
            first = NUMBERS_PER_BOX * index
            area, top, left = uniform[:, first : first + NUMBERS_PER_BOX].T
            part = jnp.exp(0.5 * (low + (high - low) * area))
            part = jnp.maximum(part, side / min(size))
            top, left = top * (1 - part), left * (1 - part)
            found.append(jnp.stack([top, left, top + part, left + part], axis=1))
        return found


class PatchPredictor(nnx.Module):
    """Predicts the teacher's patches from those of a coarse view, with two layers."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(width, width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch patches width"]
    ) -> Float[Array, "batch patches width"]:
        return self.fc2(gelu(self.fc1(x)))


class Teacher(nnx.Module):
    """The moving average of an encoder's parameters (Tarvainen & Valpola 2017).

    It moves whenever `step` is called, before the update of that step. Its variables
    are `BatchStat`, so no gradient and no weight decay reach them, checkpoints have
    them, and a step that is skipped leaves them as they are.
    """

    def __init__(self, encoder: Encoder, momentum: float):
        self.momentum = momentum
        self.average = nnx.data(
            [nnx.BatchStat(jnp.array(x)) for x in _parameters(encoder)]
        )

    def step(self, encoder: Encoder) -> None:
        """Moves the average towards the encoder."""
        keep = self.momentum
        for own, new in zip(self.average, _parameters(encoder), strict=True):
            own[...] = keep * own[...] + (1 - keep) * jax.lax.stop_gradient(new)

    def network(self, encoder: Encoder) -> Encoder:
        """An encoder like the given one, with the averaged parameters."""
        graphdef, params = nnx.split(encoder)
        averages = [own[...] for own in self.average]
        return nnx.merge(
            graphdef, jax.tree.unflatten(jax.tree.structure(params), averages)
        )


def _parameters(encoder: Encoder) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(encoder, nnx.Param))


class ScaleDistill(nnx.Module):
    """An MAE of view 1, and coarse views that the same encoder reads unmasked.

    A coarse view is view 1, or a box of it, averaged to a smaller side: the same ground
    at a coarser GSD, and few tokens. View 2 is a second, masked view. The target of the
    coarse views is view 1: its visible tokens, or all of it as an `ema` teacher sees
    it.
    """

    def __init__(
        self,
        mae: MAE,
        coarse: CoarseViews,
        predictor: PatchPredictor,
        teacher: Teacher | None = None,
    ):
        self.mae = mae
        self.coarse = coarse
        self.predictor = predictor
        self.teacher = teacher

    @property
    def encoder(self) -> Encoder:
        """The part that is exported."""
        return self.mae.encoder

    def parts(self) -> dict[str, nnx.Module]:
        """The networks that it consists of, by name."""
        return {**self.mae.parts(), "predictor": self.predictor}

    def noise_size(self, height: int, width: int) -> int:
        """The uniform numbers of a view: those of its mask, then of the boxes."""
        boxes = NUMBERS_PER_BOX * len(self.coarse.sides)
        return self.mae.noise_size(height, width) + boxes

    def __call__(
        self, views: Views, noise: Float[Array, "batch two numbers"]
    ) -> ScaleDistillOutput:
        """Encodes both views and the coarse ones, and predicts view 1's patches."""
        size = views.images.shape[2:4]
        grid = self.encoder.grid(*size)
        masked = self.mae.noise_size(*size)
        encoded = self.mae.encode(views, noise[..., :masked])
        first = jax.tree.map(lambda x: x[:, :1], encoded)
        output = self.mae.decode(first, grid=grid)
        # Patch tokens alone, without the class token.
        embedding = encoded.tokens[:, :, 1:].astype(jnp.float32).mean(axis=2)
        tokens, seen = self._target(views, first, grid)
        weight = seen[..., None]
        target = (tokens * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
        coarse, patches, targets, counts = [], [], [], []
        for side, box in zip(
            self.coarse.sides,
            self.coarse.boxes(noise[:, 0, masked:], size),
            strict=True,
        ):
            found, valid = self._coarse(views, box, side)
            part = valid.astype(jnp.float32)
            total = jnp.maximum(part.sum(axis=1, keepdims=True), 1)
            wide = found.astype(jnp.float32)
            coarse.append((wide * part[..., None]).sum(axis=1) / total)
            known, saw = _at(tokens, seen, box, grid, self.encoder.grid(side, side))
            patches.append(self.predictor(found))
            targets.append(known)
            counts.append(saw * part)
        return ScaleDistillOutput(
            **{f.name: getattr(output, f.name) for f in dataclasses.fields(output)},
            embedding=embedding,
            coarse=jnp.stack(coarse, axis=1),
            target=jax.lax.stop_gradient(target),
            coarse_patches=tuple(patches),
            target_patches=tuple(targets),
            counts=tuple(counts),
        )

    def _target(
        self, views: Views, first: EncodedViews, grid: tuple[int, int]
    ) -> tuple[Float[Array, "batch patches dim"], Float[Array, "batch patches"]]:
        """The teacher's patches of view 1, and 1 for those that it saw."""
        patches = math.prod(grid)
        valid = None
        if views.valid is not None:
            valid = valid_patches(views.valid[:, 0], self.encoder.patch_size)
        if self.teacher is None:
            tokens = first.tokens[:, 0, 1:].astype(jnp.float32)
            place = jax.nn.one_hot(first.masking.ids_keep[:, 0], patches)
            found = jnp.einsum("bkp,bkd->bpd", place, tokens)
            return jax.lax.stop_gradient(found), place.sum(axis=1)
        self.teacher.step(self.encoder)
        gsd, offset = (
            None if x is None else x[:, 0] for x in (first.gsd, first.offset)
        )
        tokens = self.teacher.network(self.encoder)(
            views.images[:, 0], gsd=gsd, offset=offset
        )
        found = jax.lax.stop_gradient(tokens[:, 1:].astype(jnp.float32))
        seen = jnp.ones(found.shape[:2]) if valid is None else valid.astype(jnp.float32)
        return found, seen

    def _coarse(
        self, views: Views, box: Float[Array, "batch 4"], side: int
    ) -> tuple[Float[Array, "batch patches dim"], Bool[Array, "batch patches"]]:
        """The patch tokens of a coarse view, and which of them are valid."""
        encoder, size = self.encoder, views.images.shape[2:4]
        valid = None if views.valid is None else views.valid[:, 0]
        images, valid = resize.area_of_boxes(
            views.images[:, 0], box, (side, side), valid
        )
        extent = views.gsd[:, 0] * jnp.array([size], jnp.float32)  # metres
        gsd, offset = (box[:, 2:] - box[:, :2]) * extent / side, None
        if encoder.positions.position == "gsd":
            unit = encoder.patch_size * encoder.positions.reference_gsd
            offset = box[:, :2] * extent / unit
        tokens = encoder(images, gsd=gsd, offset=offset)[:, 1:]
        if valid is None:
            return tokens, jnp.ones(tokens.shape[:2], bool)
        return tokens, valid_patches(valid, encoder.patch_size)


def _at(
    tokens: Float[Array, "batch patches dim"],
    seen: Float[Array, "batch patches"],
    box: Float[Array, "batch 4"],
    grid: tuple[int, int],
    new: tuple[int, int],
) -> tuple[Float[Array, "batch new_patches dim"], Float[Array, "batch new_patches"]]:
    """The mean of the seen patches under each cell of a grid `new` over a box.

    And the part of each cell that was seen.
    """
    down = resize.overlaps(box[:, 0], box[:, 2], grid[0], new[0])
    across = resize.overlaps(box[:, 1], box[:, 3], grid[1], new[1])

    def mean(x):
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0])
        x = jnp.einsum("byh,bxw,bhwd->byxd", down, across, x)
        return rearrange(x, "b y x d -> b (y x) d")

    part = mean(seen[..., None])
    found = mean(tokens * seen[..., None]) / jnp.maximum(part, 1e-4)
    return found, part[..., 0]
