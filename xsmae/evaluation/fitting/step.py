"""One step of a training with labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xsmae.optim import Optimizer
from xsmae.train_state import TrainState, updated

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def step_by(
    loss_fn: Callable[[nnx.State, nnx.State], tuple[Float[Array, ""], nnx.State]],
    state: TrainState,
    *,
    optimizer: Optimizer,
) -> tuple[TrainState, Float[Array, ""]]:
    """One update, and the loss before it.

    loss_fn(params, batch_stats) -> the loss and the new batch_stats. A step whose loss
    or gradient is not finite changes nothing.
    """
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.batch_stats
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    state = updated(state, grads, batch_stats, finite=finite, optimizer=optimizer)
    return state, loss


def head_step(
    state: TrainState,
    features: Float[Array, "*batch width"],
    targets: Int[Array, " *labels"],
    *,
    graphdef: nnx.GraphDef,
    loss: Callable[[nnx.Module, Array, Array], Float[Array, ""]],
    optimizer: Optimizer,
) -> tuple[TrainState, Float[Array, ""]]:
    """One update of a head on frozen features, and `loss(model, features, targets)`."""

    def loss_fn(params, batch_stats):
        # Variables can only be written in the trace that created them: copy them here.
        batch_stats = jax.tree.map(lambda x: x, batch_stats)
        model = nnx.merge(graphdef, params, batch_stats)
        return loss(model, features, targets), nnx.state(model, nnx.BatchStat)

    return step_by(loss_fn, state, optimizer=optimizer)
