"""AdamW with the settings of masked autoencoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import optax


def decay_mask(
    params: optax.Params, *, exempt: Collection[str] = ("bias", "scale")
) -> optax.Params:
    """True for parameters with weight decay: all except biases and scales of norms.

    `exempt` are the names without decay. Names decide, not ranks, since stacked blocks
    give every leaf a layer axis.
    """

    def decayed(path, _):
        names = [str(getattr(key, "key", key)) for key in path]
        return not set(exempt) & set(names)

    return jax.tree_util.tree_map_with_path(decayed, params)


def warmup_cosine(
    peak: float, *, num_steps: int, warmup_steps: int, end: float = 0.0
) -> optax.Schedule:
    """The one learning-rate schedule: linear from 0 to `peak`, then a cosine to `end`.

    It reaches `end` after `num_steps` updates.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=num_steps,
        end_value=end,
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The gradient transformation, and its learning rate for each update."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule


def create_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    weight_decay: float,
    b1: float,
    b2: float,
    clip_norm: float = 0.0,
) -> Optimizer:
    """AdamW with a linear warm-up from 0, then a cosine to 0 at `num_steps`.

    `clip_norm` limits the global norm of the gradient; 0 means no limit.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"a warm-up of {warmup_steps} steps in a run of {num_steps}, expected "
            "fewer warm-up steps: lower --config.optim.warmup_steps or warmup_epochs"
        )
    schedule = warmup_cosine(
        learning_rate, num_steps=num_steps, warmup_steps=warmup_steps
    )
    adamw = optax.adamw(
        schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask
    )
    if clip_norm:
        adamw = optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
    return Optimizer(adamw, schedule)
