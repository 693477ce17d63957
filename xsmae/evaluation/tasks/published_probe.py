"""The papers' linear probe: batch norm and a linear layer, trained by LARS."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xsmae.evaluation.fitting import optimizers
from xsmae.evaluation.fitting.fit import Learner
from xsmae.evaluation.fitting.recipe import Plan
from xsmae.evaluation.fitting.step import head_step
from xsmae.evaluation.measure import Measurement
from xsmae.models.linear import LinearProbe
from xsmae.train_state import create_train_state
from xsmae.weights.classifier import TrainedClassifier
from xsmae.weights.head_files import tensors_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# A warning appears if LARS can move the head by less than this many times its norm. On
# scikit-learn's digits (1,400 images), a movement of 0.1 ended at 19 % accuracy, 0.4 at
# 47 %, 2.1 at 91 %, 8.2 at 97 %. The papers' 50 epochs of fMoW-RGB allow 36.
ENOUGH_MOVEMENT = 5.0


def most_movement(plan: Plan, recipe: Mapping[str, Any]) -> float:
    """How far LARS can move a matrix in all steps of `plan`, in units of its norm.

    A step contributes `trust_coefficient` x rate x norm. Momentum multiplies that by
    1 / (1 - momentum).
    """
    rates = jax.vmap(plan.learning_rate)(jnp.arange(plan.num_steps))
    return float(rates.sum()) * recipe["trust_coefficient"] / (1 - recipe["momentum"])


def create_learner(
    job: Measurement, feature: str, plan: Plan, *, recipe: Mapping[str, Any]
) -> Learner:
    """A probe of one feature of `job.encoder`, which encodes every crop."""

    def encode(images, gsd):
        size = job.batch_size
        parts = [
            job.encoder.encode(images[start : start + size], gsd[start : start + size])
            for start in range(0, len(images), size)
        ]
        return np.concatenate([np.asarray(part[feature]) for part in parts])

    def build(rngs):
        return LinearProbe(
            width,
            len(job.parts.class_names),
            momentum=recipe["batch_norm_momentum"],
            epsilon=recipe["batch_norm_epsilon"],
            head_std=recipe["head_std"],
            rngs=rngs,
        )

    movement = most_movement(plan, recipe)
    if movement < ENOUGH_MOVEMENT:
        job.say(
            f"{plan.num_steps} steps of this recipe move the head by at most "
            f"{movement:.2g} times its norm (the papers': 36), expected at least "
            f"{ENOUGH_MOVEMENT:g}: raise --recipe.learning_rate or --recipe.epochs, or "
            "give --protocol=sweep"
        )
    width = feature_width(job, feature)
    optimizer = optimizers.lars(plan, recipe)
    graphdef, state = create_train_state(build, optimizer, jax.random.key(job.seed))
    step = jax.jit(
        functools.partial(
            head_step, graphdef=graphdef, loss=cross_entropy, optimizer=optimizer
        ),
        donate_argnums=0,
    )

    @jax.jit
    def scores(state, features):
        model = nnx.merge(graphdef, state.params, state.batch_stats)
        return model(features, training=False)

    def trained(state):
        architecture = {
            "epsilon": recipe["batch_norm_epsilon"],
            "dtype": job.encoder.dtype,
        }
        tensors = tensors_of(state.params, state.batch_stats)
        return TrainedClassifier("batch_norm", tensors, architecture, job.encoder)

    return Learner(
        state=state,
        step=lambda state, images, gsd, labels: step(
            state, encode(images, gsd), labels
        ),
        predict=lambda state, images, gsd: scores(state, encode(images, gsd)),
        feature_scaling="batch norm",
        trained=trained if job.encoder.network else None,
    )


def feature_width(job: Measurement, feature: str) -> int:
    """The width of a feature; without a network, one blank image is encoded."""
    if job.encoder.network is not None:
        return job.encoder.network.embed_dim
    side, source = job.scales[0].size, job.parts.train
    blank = np.zeros((1, side, side, len(source.bands)), source.dtype)
    return job.encoder.encode(blank, np.ones((1, 2), np.float32))[feature].shape[1]


def cross_entropy(
    model: LinearProbe,
    features: Float[Array, "batch width"],
    labels: Int[Array, " batch"],
) -> Float[Array, ""]:
    """The mean cross-entropy of a batch in training."""
    return optax.softmax_cross_entropy_with_integer_labels(
        model(features, training=True), labels
    ).mean()
