"""The state of a run and the step from one to the next: pure functions of arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from xsmae.bands import Bands
from xsmae.models.mae import Views
from xsmae.models.position import relative_box
from xsmae.ops import resize
from xsmae.optim import Optimizer

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    step: the number of batches seen, which is the position in the data too.
    params, batch_stats: the model's variables. opt_state: optax's.
    key: the key of the run; step i draws from `fold_in(key, i)`.
    nonfinite, nonfinite_in_a_row: updates skipped in all, and since the last good one.
    """

    step: Int[Array, ""]
    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    key: Key[Array, ""]
    nonfinite: Int[Array, ""]
    nonfinite_in_a_row: Int[Array, ""]


def create_train_state(
    build: Callable[[nnx.Rngs], nnx.Module], optimizer: Optimizer, key: Key[Array, ""]
) -> tuple[nnx.GraphDef, TrainState]:
    """A new model's definition and the state before the first step."""
    params_key, run_key = jax.random.split(key)
    graphdef, params, batch_stats = nnx.split(
        build(nnx.Rngs(params=params_key)), nnx.Param, nnx.BatchStat
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.transform.init(params),
        key=run_key,
        nonfinite=jnp.zeros((), jnp.int32),
        nonfinite_in_a_row=jnp.zeros((), jnp.int32),
    )
    return graphdef, state


def prepare_views(
    batch: Mapping[str, Array], *, bands: Bands, target_scale: int = 1
) -> Views:
    """What the pipeline read, as the model takes it: normalised, boxes relative.

    With `target_scale` > 1 what was read is the target, and the model's images are its
    means over that many pixels.
    """
    images, target = bands.normalize(batch["image"]), None
    if target_scale > 1:
        target, (height, width) = images, images.shape[2:4]
        images = resize.area(target, (height // target_scale, width // target_scale))
    return Views(
        images=images,
        gsd=batch["gsd"] * target_scale,
        box=relative_box(batch["box"], batch["flip"]),
        target=target,
    )


def draw_noise(
    key: Key[Array, ""], views: Views, noise_size: int
) -> Float[Array, "batch views numbers"]:
    """The uniform numbers whose order decides the masks, independent for each view."""
    return jax.random.uniform(key, (*views.images.shape[:2], noise_size))


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    *,
    graphdef: nnx.GraphDef,
    losses: Callable[..., tuple[dict[str, Array], dict[str, Array]]],
    weights: Mapping[str, float],
    optimizer: Optimizer,
    noise_size: int,
    bands: Bands,
    target_scale: int = 1,
    accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from one global batch, and its metrics.

    `losses(output, views)` gives the terms and the reported extras; the total is the
    sum of the terms times `weights`. `noise_size` and `target_scale` are the model's.
    With `accumulation_steps` > 1 the gradient is the mean over that many parts of the
    batch. The masks are those of the whole batch, so for losses that are means over
    samples it equals the large batch's gradient. Not so where samples meet: the
    contrastive loss finds its negatives, and batch norm its statistics, in one part
    alone.

    A total or a gradient that is not finite leaves parameters, optimiser and batch
    statistics as they were, and is counted.
    """
    views = prepare_views(batch, bands=bands, target_scale=target_scale)
    noise = draw_noise(jax.random.fold_in(state.key, state.step), views, noise_size)

    def loss_fn(params, batch_stats, views, noise):
        # Variables may only be written to in the trace that made them: make them here.
        batch_stats = jax.tree.map(lambda x: x, batch_stats)
        model = nnx.merge(graphdef, params, batch_stats)
        terms, extras = losses(model(views, noise), views)
        # A term of weight 0 is reported alone: 0 times infinity would not be 0.
        weighted = [weights[n] * term for n, term in terms.items() if weights[n]]
        total = sum(weighted, jnp.zeros(()))
        metrics = {"loss": total}
        metrics |= {f"loss/{name}": value for name, value in (terms | extras).items()}
        return total, (metrics, nnx.state(model, nnx.BatchStat))

    if accumulation_steps == 1:
        grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, views, noise
        )
    else:
        grads, metrics, batch_stats = _accumulate(
            loss_fn, state, (views, noise), accumulation_steps
        )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    new_state = updated(state, grads, batch_stats, finite=finite, optimizer=optimizer)
    updates_done = state.step - state.nonfinite
    metrics |= {
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(optimizer.learning_rate(updates_done)),
        "nonfinite": new_state.nonfinite,
        "nonfinite_in_a_row": new_state.nonfinite_in_a_row,
    }
    return new_state, metrics


def updated(
    state: TrainState,
    grads: optax.Updates,
    batch_stats: nnx.State,
    *,
    finite: Bool[Array, ""],
    optimizer: Optimizer,
) -> TrainState:
    """The state after a step; where not `finite` it is as it was, and that counted."""
    updates, opt_state = optimizer.transform.update(
        grads, state.opt_state, state.params
    )
    keep = functools.partial(jnp.where, finite)
    return TrainState(
        step=state.step + 1,
        params=jax.tree.map(
            keep, optax.apply_updates(state.params, updates), state.params
        ),
        batch_stats=jax.tree.map(keep, batch_stats, state.batch_stats),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
        nonfinite=state.nonfinite + ~finite,
        nonfinite_in_a_row=jnp.where(finite, 0, state.nonfinite_in_a_row + 1),
    )


def _accumulate(loss_fn, state: TrainState, inputs: Any, parts: int):
    """Mean gradient and metrics over `parts` of the batch, one after the other.

    The backward passes add to one gradient where it lies. Added up outside of them,
    each part's would be whole for a moment beside the sum of those before it.
    """
    # Every parts-th sample: each device of a batch-sharded array divides its own rows.
    inputs = jax.tree.map(
        lambda x: rearrange(x, "(b parts) ... -> parts b ...", parts=parts), inputs
    )
    mean = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), state.params)

    def add(batch_stats, part):
        total, backward, (metrics, batch_stats) = jax.vjp(
            lambda params: loss_fn(params, batch_stats, *part),
            state.params,
            has_aux=True,
        )
        backward.with_refs(mean)(jnp.full_like(total, 1 / parts))
        return batch_stats, metrics

    batch_stats, metrics = jax.lax.scan(add, state.batch_stats, inputs)
    grads = jax.tree.map(jax.ref.freeze, mean)
    return grads, jax.tree.map(lambda m: m.mean(axis=0), metrics), batch_stats
