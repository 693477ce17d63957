"""The state of a run and the training step: pure functions of arrays."""

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
    """Everything that a run carries from step to step.

    step: the number of batches seen, also the position in the data.
    params, batch_stats: the model's variables. opt_state: the state of optax.
    key: the key of the run; step i draws from `fold_in(key, i)`.
    nonfinite, nonfinite_in_a_row: updates skipped in total, and since the last good
    one.
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
    """The definition of a new model, and the state before the first step."""
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
    """Turns a pipeline batch into model input: normalised images, relative boxes.

    With `target_scale` > 1, the batch's images are the target, and the model reads
    their means over `target_scale` x `target_scale` pixels. If the batch has `valid`,
    the other pixels become 0, whatever they are, and means are over the valid ones.
    """
    if batch["image"].dtype != bands.dtype:
        raise ValueError(
            f"a batch of {batch['image'].dtype} images, expected {bands.dtype}, the "
            "dtype of the bands"
        )
    images, target = bands.normalize(batch["image"]), None
    valid, target_valid = batch.get("valid"), None
    if valid is not None:
        images = jnp.where(valid[..., None], images, 0)
    if target_scale > 1:
        target, target_valid, (height, width) = images, valid, images.shape[2:4]
        size = (height // target_scale, width // target_scale)
        if valid is None:
            images = resize.area(target, size)
        else:
            images, valid = resize.area_of_valid(target, valid, size)
    return Views(
        images=images,
        gsd=batch["gsd"] * target_scale,
        box=relative_box(batch["box"], batch["flip"]),
        target=target,
        valid=valid,
        target_valid=target_valid,
    )


def draw_noise(
    key: Key[Array, ""], views: Views, noise_size: int
) -> Float[Array, "batch views numbers"]:
    """Uniform numbers, independent for each view; their order decides the masks."""
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

    `losses(output, views)` gives the terms and extra values to report. The total is the
    sum of the terms times `weights`. `noise_size` and `target_scale` come from the
    model. With `accumulation_steps` > 1, the gradient is the mean over that many parts
    of the batch. The masks are drawn for the whole batch. So for losses that are means
    over samples, the gradient equals that of the whole batch. It differs where samples
    interact: the negatives of the contrastive loss and the statistics of batch norm
    come from one part only. It also differs if parts have different numbers of valid
    patches: each part counts the same.

    If the total or the gradient is not finite, parameters, optimiser and batch
    statistics do not change, and the step is counted as skipped.
    """
    views = prepare_views(batch, bands=bands, target_scale=target_scale)
    noise = draw_noise(jax.random.fold_in(state.key, state.step), views, noise_size)

    def loss_fn(params, batch_stats, views, noise):
        # Variables may be written only in the trace that created them: copy them here.
        batch_stats = jax.tree.map(lambda x: x, batch_stats)
        model = nnx.merge(graphdef, params, batch_stats)
        terms, extras = losses(model(views, noise), views)
        # A term of weight 0 is only reported, since 0 times infinity is not 0.
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
    """The state after a step; unchanged and counted as skipped if not `finite`."""
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

    The backward passes add to one gradient in place. Adding outside would need memory
    for a second gradient: that of the current part beside the sum.
    """
    # A part has every parts-th sample, so each device divides its own rows.
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
