"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import functools
import time
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

EVERY = 10.0  # seconds between two lines of progress


def normalize(features: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """Rows scaled to unit length, in float64; zero rows stay zero."""
    features = np.asarray(features, np.float64)
    return features / _lengths(features)[:, None]


def _lengths(features: np.ndarray) -> np.ndarray:
    """Row lengths in float64; 1 for zero rows, so that dividing keeps them zero."""
    # numpy sums each row alone, so a row's length does not depend on other rows.
    parts = np.array_split(features, max(1, len(features) // 4096))
    parts = [part.astype(np.float64) for part in parts]
    length = np.sqrt(np.concatenate([np.einsum("nd,nd->n", p, p) for p in parts]))
    return np.where(length < 1e-12, 1.0, length)


def _fixed_point(features, lengths):
    """Unit vectors rounded to multiples of 2**-26, so that dot products are exact.

    A product of two entries is a multiple of 2**-52, and no partial sum exceeds 1 by
    more than rounding. So float64 additions never round, and the order of summation,
    which depends on tiling, devices and library, does not change a bit. The rounding of
    the entries is below float32's own.
    """
    unit = features.astype(jnp.float64) / lengths[:, None]
    return jnp.round(unit * 2.0**26) * 2.0**-26


@functools.partial(jax.jit, static_argnames="k")
def _merge_nearest(queries, bank, start, count, found, *, k):
    """The k nearest rows among `found` and the tile `bank`, which begins at `start`.

    queries, bank: (features, lengths). Tile rows from `count` onwards are padding.
    found: similarities, best first, and their rows. The lower row wins a tie, because
    `top_k` keeps the order of ties and `found` has lower rows than the tile.
    """
    exact = jnp.einsum("qd,nd->qn", _fixed_point(*queries), _fixed_point(*bank))
    # `top_k` ranks -0 below 0.
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
    """The k rows of `bank` with the highest cosine similarity to each query.

    Returns (similarities, rows), best first; the lower row wins a tie. Similarities are
    exact and rounded to float32 once. The work is cut into tiles of `bank_chunk` rows
    by `chunk` queries; the queries are divided over the devices. Only one tile is in
    memory besides the arguments. Tile sizes and devices do not change a bit. If the
    bank has fewer than k rows, all are returned. Raises KeyboardInterrupt between tiles
    once `should_stop()` is true.
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
    """Pad with rows of ones: every tile has the same shape and no zero length."""
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
    """The class with the largest sum of exp(similarity / t); the lowest wins a tie.

    Neighbours come best first, and are summed in float64 in that order.
    """
    # Divide by the nearest neighbour's weight: the votes stay, and nothing overflows.
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
    """Classify the queries: the k most similar rows vote with exp(cosine / t).

    k = 20 and t = 0.07 are those of Wu et al. 2018, as Scale-MAE (Reed et al. 2023)
    uses them. If the bank has fewer than k rows, all vote. tiling: see `nearest`.
    """
    similarity, rows = nearest(bank, queries, k=k, **tiling)
    labels = np.asarray(bank_labels)[rows]
    return vote(similarity, labels, num_classes=num_classes, temperature=temperature)


class KnnMonitor:
    """kNN accuracy of an encoder on labelled images, with two controls.

    The bank comes from `train`, the queries from `test`: whole images at `size` pixels,
    as in every evaluation. `max_train` and `max_test` limit their number; 0 means all.
    `say` gets a line of progress every `EVERY` seconds.
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
        say: Callable[[str], None] = lambda line: None,
    ):
        if train.class_names != test.class_names:
            raise UserError(
                "the kNN monitor's two parts have different classes (only one has "
                f"{', '.join(sorted(set(train.class_names) ^ set(test.class_names)))})"
                ": give config.knn.train and config.knn.test of one data set"
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
        self._options = {
            "size": size, "batch_size": batch_size, "should_stop": should_stop
        }  # fmt: skip
        self._say = say

    def accuracy(self, encode) -> dict[str, float]:
        """The accuracy of each feature that `encode(images, gsd)` returns."""
        bank, bank_labels = self._extract(encode, self.train, self.train_indices)
        queries, labels = self._extract(encode, self.test, self.test_indices)
        return {
            name: float(
                (self._vote(bank[name], bank_labels, queries[name]) == labels).mean()
            )
            for name in bank
        }

    def _extract(self, encode, source, indices):
        """Features and labels, see `extract`, with lines of progress."""
        done, last = 0, time.monotonic()

        def counted(images, gsd):
            nonlocal done, last
            found = encode(images, gsd)
            done = min(done + len(images), len(indices))
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                self._say(f"kNN: features of {done}/{len(indices)} images")
            return found

        return extract(counted, source, indices, **self._options)

    def controls(self, encode_random) -> dict[str, float]:
        """The accuracies of two untrained controls: random encoder and statistics."""
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
