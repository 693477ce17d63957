"""Segmentation from frozen features: a linear layer per pixel, and dense retrieval."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.evaluation.fitting import optimizers
from xsmae.evaluation.fitting.recipe import Plan
from xsmae.evaluation.fitting.step import head_step
from xsmae.evaluation.segmentation.cache import Rows
from xsmae.evaluation.segmentation.dense import Dense
from xsmae.evaluation.segmentation.windows import Predict
from xsmae.evaluation.tasks.knn import nearest
from xsmae.evaluation.tasks.segment import cross_entropy
from xsmae.models.pixel_linear import PixelLinear
from xsmae.ops import resize
from xsmae.train_state import TrainState, create_train_state

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

AT_ONCE = 16  # windows that are read from disk together


@dataclasses.dataclass(frozen=True)
class Linear:
    """A trained linear layer: `linear(images, gsd)` gives the scores of all pixels."""

    state: TrainState
    predict: Predict

    def __call__(self, images: np.ndarray, gsd: np.ndarray) -> np.ndarray:
        return self.predict(images, gsd)


def fit_linear(
    dense: Dense,
    features: Rows | Float[np.ndarray, "n rows columns width"],
    masks: Rows | UInt8[np.ndarray, "n height width"],
    num_classes: int,
    plan: Plan,
    *,
    recipe: Mapping[str, Any],
    seed: int,
    each_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Linear:
    """Trains the linear layer by AdamW.

    features, masks: what `cached_windows` gives for `dense`, or arrays in memory.
    each_step gets the step and its loss.
    """
    layer = create_layer(
        features.shape[-1], num_classes, plan, recipe=recipe, seed=seed
    )
    state = layer.state
    rows = _rows(len(features), recipe["batch_size"], plan.num_steps, seed)
    for number, batch in enumerate(rows, 1):
        state, loss = layer.step(state, features[batch], masks[batch])
        each_step(number, loss)
    return Linear(
        state,
        lambda images, gsd: layer.scores(
            state, dense(images, gsd), size=images.shape[1:3]
        ),
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer that can be trained, on features [n, rows, columns, width].

    state: the initial state. step(state, features, masks) -> (state, loss).
    scores(state, features, size=(height, width)) -> [n, height, width, classes].
    """

    state: TrainState
    step: Callable[..., tuple[TrainState, jax.Array]]
    scores: Callable[..., jax.Array]


def create_layer(
    width: int,
    num_classes: int,
    plan: Plan,
    *,
    recipe: Mapping[str, Any],
    seed: int,
) -> Layer:
    """A layer with random weights, and AdamW for it."""

    def build(rngs):
        return PixelLinear(
            width,
            num_classes,
            momentum=recipe["batch_norm_momentum"],
            epsilon=recipe["batch_norm_epsilon"],
            head_std=recipe["head_std"],
            rngs=rngs,
        )

    def loss(model, features, masks):
        scores = model(features, size=masks.shape[1:3], training=True)
        return cross_entropy(scores, masks)

    optimizer = optimizers.adamw(plan, recipe)
    graphdef, state = create_train_state(build, optimizer, jax.random.key(seed))
    step = jax.jit(
        functools.partial(head_step, graphdef=graphdef, loss=loss, optimizer=optimizer),
        donate_argnums=0,
    )

    @functools.partial(jax.jit, static_argnames="size")
    def scores(state, features, *, size):
        model = nnx.merge(graphdef, state.params, state.batch_stats)
        return model(features, size=size, training=False)

    return Layer(state, step, scores)


def _rows(total: int, batch: int, num_steps: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each step: every row once per epoch, in an order of its own."""
    rng, waiting = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(num_steps):
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, rng.permutation(total)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def class_histograms(
    masks: UInt8[np.ndarray, "n height width"], grid: tuple[int, int], num_classes: int
) -> Float[np.ndarray, "n rows columns classes"]:
    """The share of each class among a patch's pixels that count; 0 without any."""
    n, height, width = masks.shape
    rows, columns = grid
    patches = masks.reshape(n, rows, height // rows, columns, width // columns)
    counts = [(patches == c).sum(axis=(2, 4)) for c in range(num_classes)]
    counts = np.stack(counts, axis=-1).astype(np.float32)
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def retrieval(
    dense: Dense,
    features: Rows | Float[np.ndarray, "n rows columns width"],
    masks: Rows | UInt8[np.ndarray, "n height width"],
    num_classes: int,
    *,
    seed: int,
    k: int,
    temperature: float,
    memory: int,
) -> Predict:
    """Dense kNN: the k most similar training patches vote with their histograms.

    A vote weighs exp(cosine / temperature), normalised over the k. The memory has up to
    `memory` patches, drawn at random among those with a pixel that counts. features,
    masks: what `cached_windows` gives for `dense`, or arrays in memory. Returns
    `predict(images, gsd)`, the shares of the votes for all pixels.
    """
    n, *grid, width = features.shape
    parts = [np.arange(n)[start : start + AT_ONCE] for start in range(0, n, AT_ONCE)]

    def shares_of(rows):
        return class_histograms(masks[rows], grid, num_classes).reshape(-1, num_classes)

    known = np.flatnonzero(np.concatenate([shares_of(r).any(axis=1) for r in parts]))
    if len(known) > memory:
        chosen = np.random.default_rng(seed).permutation(len(known))[:memory]
        known = known[np.sort(chosen)]
    bank = np.empty((len(known), width), np.float32)
    values = np.empty((len(known), num_classes), np.float32)
    for rows in parts:
        first, stop = np.array((rows[0], rows[-1] + 1)) * np.prod(grid)
        here = slice(*np.searchsorted(known, (first, stop)))
        places = known[here] - first
        bank[here] = features[rows].reshape(-1, width)[places]
        values[here] = shares_of(rows)[places]

    def votes(queries):
        similarity, rows = nearest(bank, queries, k=k)
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("qk,qkc->qc", weights, values[rows])

    def predict(images, gsd):
        # In float16, like the memory.
        found = np.asarray(dense(images, gsd)).astype(np.float16).astype(np.float32)
        shares = votes(found.reshape(-1, found.shape[-1]))
        shares = shares.reshape(*found.shape[:3], num_classes).astype(np.float32)
        return resize.bilinear(jnp.asarray(shares), images.shape[1:3])

    return predict
