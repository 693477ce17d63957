"""The optimisers of classifiers: AdamW with layer decay, and LARS."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from xsmae.evaluation.fitting.recipe import Plan
from xsmae.optim import Optimizer, decay_mask

if TYPE_CHECKING:
    from jaxtyping import PyTree

# No weight decay for biases, norms and the class token (MAE's models_vit.py).
NOT_DECAYED = ("bias", "scale", "cls_token")


def adamw(plan: Plan, recipe: Mapping[str, Any], *, depth: int = 0) -> Optimizer:
    """AdamW by a recipe, with its layer decay if it has one.

    depth: of the encoder that is trained.
    """
    transform = create_adamw(
        plan.learning_rate,
        depth=depth,
        layer_decay=recipe.get("layer_decay", 1.0),
        **{name: recipe[name] for name in ("weight_decay", "b1", "b2")},
    )
    return Optimizer(transform, plan.learning_rate)


def lars(plan: Plan, recipe: Mapping[str, Any]) -> Optimizer:
    """LARS by a recipe."""
    names = ("momentum", "trust_coefficient", "weight_decay")
    transform = create_lars(plan.learning_rate, **{n: recipe[n] for n in names})
    return Optimizer(transform, plan.learning_rate)


def create_adamw(
    learning_rate: float | optax.Schedule,
    *,
    depth: int,
    layer_decay: float,
    weight_decay: float,
    b1: float,
    b2: float,
) -> optax.GradientTransformation:
    """AdamW with smaller updates and smaller weight decay in lower layers."""
    adamw = optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=functools.partial(decay_mask, exempt=NOT_DECAYED),
    )

    def scaled(updates, params):
        scales = layer_scales(params, depth=depth, decay=layer_decay)
        return jax.tree.map(jnp.multiply, updates, scales)

    return optax.chain(adamw, optax.stateless(scaled))


def layer_scales(params: PyTree, *, depth: int, decay: float) -> PyTree:
    """Factors of the learning rate, one per parameter, in shapes that broadcast.

    The factor is decay ** (depth + 1 - layer). The patch embedding and the class token
    are layer 0, block i is layer i + 1, and everything after the blocks is layer depth
    + 1, at the full rate (BEiT's rule, in MAE's util/lr_decay.py). Stacked blocks have
    one factor per slice of their leading axis.
    """

    def scale(path, leaf):
        names = {str(getattr(key, "key", key)) for key in path}
        if "blocks" in names:
            below = depth - jnp.arange(depth)
            return decay ** below.reshape(-1, *[1] * (leaf.ndim - 1))
        first = {"patch_embed", "cls_token"} & names
        return jnp.asarray(decay ** (depth + 1 if first else 0))

    return jax.tree_util.tree_map_with_path(scale, params)


def create_lars(
    learning_rate: float | optax.Schedule,
    *,
    momentum: float,
    trust_coefficient: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """LARS (You et al. 2017), without trust ratio or decay for biases and norms.

    As in the paper, momentum accumulates updates already multiplied by the rate. MoCo
    v3's util/lars.py multiplies the accumulated sum by the current rate.
    """

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.lars(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=matrices,
        trust_coefficient=trust_coefficient,
        trust_ratio_mask=matrices,
        momentum=momentum,
    )
