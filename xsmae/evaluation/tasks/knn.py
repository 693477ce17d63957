"""Weighted k-nearest-neighbour classification of frozen features, and its monitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    FEATURES,
    extract,
    image_statistics,
    spread,
    standardize,
)
from xsmae.sharding import by_batch, replicated

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def normalize(features: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """To unit length, float64; a zero vector stays zero."""
    features = np.asarray(features, np.float64)
    return features / _lengths(features)[:, None]


def _lengths(features: np.ndarray) -> np.ndarray:
    """Of each row, in float64; 1 for a zero vector, which so stays one."""
    # Row by row in numpy, so that a row's length does not depend on its neighbours.
    parts = np.array_split(features, max(1, len(features) // 4096))
    parts = [part.astype(np.float64) for part in parts]
    length = np.sqrt(np.concatenate([np.einsum("nd,nd->n", p, p) for p in parts]))
    return np.where(length < 1e-12, 1.0, length)


def _fixed_point(features, lengths):
    """Unit vectors as multiples of 2**-26, whose dot products float64 holds exactly.

    A product of two is a multiple of 2**-52 and no partial sum exceeds 1 by more than
    rounding, so no addition rounds: the order of summation, hence the tiling, the
    devices and the library, changes no bit. The error is below float32's own.
    """
    unit = features.astype(jnp.float64) / lengths[:, None]
    return jnp.round(unit * 2.0**26) * 2.0**-26


@functools.partial(jax.jit, static_argnames="k")
def _merge_nearest(queries, bank, start, count, found, *, k):
    """The k nearest of `found` and of the tile `bank`, whose rows begin at `start`.

    queries and bank: (features, lengths); rows of the tile from `count` on are padding.
    found: similarities, best first, and rows. Of equal similarities the lower row goes
    first: `top_k` keeps the order of equals, and `found` holds lower rows.
    """
    exact = jnp.einsum("qd,nd->qn", _fixed_point(*queries), _fixed_point(*bank))
    # `top_k` holds -0 for less than 0.
    similarity = jnp.where(exact == 0, 0, exact).astype(jnp.float32)
    similarity = jnp.where(jnp.arange(exact.shape[1]) < count, similarity, -jnp.inf)
    best, row = jax.lax.top_k(similarity, min(k, similarity.shape[1]))
    similarity = jnp.concatenate([found[0], best], axis=1)
    rows = jnp.concatenate([found[1], row + start], axis=1)
    best, place = jax.lax.top_k(similarity, k)
    return best, jnp.take_along_axis(rows, place, axis=1)


def nearest(
    bank: Float[np.ndarray, "n width"],
    queries: Float[np.ndarray, "m width"],
    *,
    k: int,
    chunk: int = 1024,
    bank_chunk: int = 4096,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """The k rows of `bank` most similar by cosine to each query, and how similar.

    Similarities are exact, rounded to float32 once; best first, of equal ones the lower
    row. Works through `bank_chunk` rows by `chunk` queries a device, the queries
    divided over the devices, and keeps no more than that in memory beside its
    arguments; neither number nor the devices change a bit. A bank smaller than k is
    given whole. Raises KeyboardInterrupt between two tiles once `should_stop()`.
    """
    bank, queries = np.asarray(bank), np.asarray(queries)
    k = min(k, len(bank))
    # TPUs have no float64 dot product of their own.
    cpu = jax.default_backend() == "tpu"
    devices = jax.local_devices(backend="cpu") if cpu else jax.local_devices()
    chunk = -(-min(chunk, len(queries)) // len(devices)) * len(devices)
    bank_chunk = min(bank_chunk, len(bank))
    mesh = Mesh(np.array(devices), ("data",))
    bank_lengths, query_lengths = _lengths(bank), _lengths(queries)
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.zeros((len(queries), k), np.int32)
    with jax.enable_x64(True):
        for start in range(0, len(bank), bank_chunk):
            part = slice(start, start + bank_chunk)
            tile = _padded((bank[part], bank_lengths[part]), bank_chunk)
            tile = jax.device_put(tile, replicated(mesh))
            count = min(bank_chunk, len(bank) - start)
            for first in range(0, len(queries), chunk):
                if should_stop():
                    raise KeyboardInterrupt
                part = slice(first, first + chunk)
                several = (queries[part], query_lengths[part])
                found = (similarity[part], rows[part])
                several, found = jax.device_put(
                    (_padded(several, chunk), _padded(found, chunk)), by_batch(mesh)
                )
                found = _merge_nearest(
                    several, tile, np.int32(start), np.int32(count), found, k=k
                )
                length = len(queries[part])
                similarity[part], rows[part] = (np.asarray(x)[:length] for x in found)
    return similarity, rows


def _padded(arrays: tuple[np.ndarray, ...], rows: int) -> tuple[np.ndarray, ...]:
    """Ones below, so that every tile has one shape and none a zero length."""
    missing = rows - len(arrays[0])
    return tuple(
        np.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)], constant_values=1)
        for a in arrays
    )


def vote(
    similarity: Float[np.ndarray, "m k"],
    labels: Int[np.ndarray, "m k"],
    *,
    num_classes: int,
    temperature: float,
) -> Int[np.ndarray, " m"]:
    """The class with the largest sum of exp(similarity / t); of equal ones the lower.

    Neighbours best first. Summed in float64 in their order.
    """
    # Divided by the nearest one's weight, which changes no vote and cannot overflow.
    similarity = np.asarray(similarity, np.float64)
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    votes = np.zeros((len(similarity), num_classes))
    for weight, label in zip(weights.T, labels.T, strict=True):
        votes[np.arange(len(votes)), label] += weight
    return votes.argmax(axis=1)


def knn_predict(
    bank: Float[np.ndarray, "n width"],
    bank_labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "m width"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    **tiling: Any,
) -> Int[np.ndarray, " m"]:
    """The class of each query: its k most similar by cosine vote with exp(sim / t).

    k = 20 and t = 0.07: Wu et al. 2018 as Scale-MAE (Reed et al. 2023) uses it. A bank
    smaller than k votes whole. `tiling` is what `nearest` takes.
    """
    similarity, rows = nearest(bank, queries, k=k, **tiling)
    labels = np.asarray(bank_labels)[rows]
    return vote(similarity, labels, num_classes=num_classes, temperature=temperature)


class KnnMonitor:
    """kNN accuracy of an encoder on labelled images, with its two controls.

    The bank is of `train`, the queries are of `test`; both whole images at `size`
    pixels, seen as every evaluation sees them. `max_train` and `max_test` bound them, 0
    for all.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        size: int,
        k: int,
        temperature: float,
        max_train: int,
        max_test: int,
        batch_size: int,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        if train.class_names != test.class_names:
            raise UserError(
                "the kNN monitor's two parts have different classes: "
                f"{', '.join(sorted(set(train.class_names) ^ set(test.class_names)))} "
                "only in one of them; give config.knn.train and config.knn.test of one "
                "data set"
            )
        self.train, self.test = train, test
        self.train_indices = spread(len(train), max_train)
        self.test_indices = spread(len(test), max_test)
        self._vote = functools.partial(
            knn_predict,
            num_classes=len(train.class_names),
            k=k,
            temperature=temperature,
            should_stop=should_stop,
        )
        self._extract = functools.partial(
            extract, size=size, batch_size=batch_size, should_stop=should_stop
        )

    def accuracy(self, encode) -> dict[str, float]:
        """Of each feature that `encode(images, gsd)` gives, the fraction right."""
        bank, bank_labels = self._extract(encode, self.train, self.train_indices)
        queries, labels = self._extract(encode, self.test, self.test_indices)
        return {
            name: float(
                (self._vote(bank[name], bank_labels, queries[name]) == labels).mean()
            )
            for name in bank
        }

    def controls(self, encode_random) -> dict[str, float]:
        """What costs no training: a random encoder, and image statistics."""
        random = self.accuracy(encode_random)
        bank, bank_labels = self._extract(
            image_statistics, self.train, self.train_indices
        )
        queries, labels = self._extract(image_statistics, self.test, self.test_indices)
        bank, queries = standardize(bank["statistics"], queries["statistics"])
        predicted = self._vote(bank, bank_labels, queries)
        return {
            **{f"random_encoder_{name}": random[name] for name in FEATURES},
            "image_statistics": float((predicted == labels).mean()),
        }
