"""Weighted k-nearest-neighbour classification of frozen features, and its monitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from xsmae.data.sources import Source
from xsmae.errors import UserError
from xsmae.evaluation.features import (
    FEATURES,
    extract,
    image_statistics,
    spread,
    standardize,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def normalize(features: Float[Array, "n width"]) -> Float[Array, "n width"]:
    """To unit length; a zero vector stays zero."""
    features = jnp.asarray(features, jnp.float32)
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(norm, 1e-12)


@functools.partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(queries, bank, bank_labels, *, num_classes, k, temperature):
    similarity = jnp.einsum("qd,nd->qn", queries, bank)
    nearest, index = jax.lax.top_k(similarity, k)
    votes = jax.nn.one_hot(bank_labels[index], num_classes)
    # Divided by the nearest one's weight, which changes no vote and cannot overflow.
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    return jnp.einsum("qk,qkc->qc", weights, votes).argmax(-1)


def knn_predict(
    bank: Float[Array, "n width"],
    bank_labels: Int[Array, n],
    queries: Float[Array, "m width"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> np.ndarray:
    """The class of each query: its k most similar by cosine vote with exp(sim / t).

    k = 20 and t = 0.07: Wu et al. 2018 as Scale-MAE (Reed et al. 2023) uses it. Works
    through `chunk` queries at a time. A bank smaller than k votes whole.
    """
    bank, queries = normalize(bank), normalize(queries)
    bank_labels = jnp.asarray(bank_labels)
    predicted = [
        _vote(
            queries[start : start + chunk],
            bank,
            bank_labels,
            num_classes=num_classes,
            k=min(k, len(bank)),
            temperature=temperature,
        )
        for start in range(0, len(queries), chunk)
    ]
    return np.concatenate([np.asarray(p) for p in predicted])


class KnnMonitor:
    """kNN accuracy of an encoder on labelled images, with its two controls.

    The bank is of `train`, the queries are of `test`; both whole images at `size`
    pixels. `max_train` and `max_test` bound them, 0 for all.
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
