"""States to save and restore."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from xsmae.train_state import TrainState


def some_state(step, **changes):
    """A state with leaves of every kind; each depends on `step`."""
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32),
        "norm": {"scale": jnp.asarray(rng.normal(size=7), jnp.bfloat16)},
    }
    state = TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={"mean": jnp.full(5, -0.0)},
        opt_state=(jax.tree.map(jnp.square, params), jnp.int32(7)),
        key=jax.random.key(step),
        nonfinite=jnp.int32(0),
        nonfinite_in_a_row=jnp.int32(0),
    )
    return dataclasses.replace(state, **changes)
