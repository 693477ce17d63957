"""Fine-tuning: trains the whole encoder and a classifier, by MAE's recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xsmae.bands import Bands
from xsmae.evaluation.fitting.augment import mix, random_erasing
from xsmae.evaluation.fitting.fit import Learner
from xsmae.evaluation.fitting.recipe import Plan
from xsmae.evaluation.measure import Measurement
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.models.build import build_encoder
from xsmae.models.drop_path import drop_path_scales
from xsmae.models.pooling import pool
from xsmae.models.vit import Encoder, LayerNorm
from xsmae.optim import Optimizer, decay_mask
from xsmae.sharding import by_batch, create_mesh, replicated
from xsmae.train_state import TrainState, create_train_state, updated

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PyTree, Shaped

# No weight decay for biases, norms and the class token (MAE's models_vit.py).
NOT_DECAYED = ("bias", "scale", "cls_token")


class Classifier(nnx.Module):
    """An encoder with a linear layer on top.

    feature: `mean` averages the patch tokens and applies a LayerNorm `fc_norm`, which
    replaces the encoder's last norm (MAE's global_pool); `cls` takes the encoder's
    class token.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        *,
        feature: str,
        head_std: float,
        rngs: nnx.Rngs,
    ):
        width = encoder.embed_dim
        self.encoder = encoder
        if feature == "mean":
            self.fc_norm = LayerNorm(
                width, epsilon=1e-6, out_dtype=jnp.float32, rngs=rngs
            )
        else:
            self.fc_norm = None
        self.head = nnx.Linear(
            width,
            num_classes,
            kernel_init=nnx.initializers.normal(head_std),
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        gsd: Float[Array, "batch 2"],
        branch_scales: Float[Array, "depth 2 batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Scores of normalised images; `branch_scales` is for training only."""
        tokens = self.encoder(images, gsd=gsd, branch_scales=branch_scales)
        tokens = tokens.astype(jnp.float32)
        if self.fc_norm is None:
            return self.head(pool(tokens, "cls"))
        return self.head(self.fc_norm(pool(tokens, "mean")))


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


def copied_network(encoder: FrozenEncoder, *, dtype: str, **changes: Any) -> Encoder:
    """A copy of an encoder's network that computes in `dtype`.

    The copy belongs to a training, whose step overwrites its state. changes: of the
    architecture, with the same parameters.
    """
    execution = {"attention": "xla", "remat": "elementwise", "scan": True}
    model = {**encoder.info["architecture"], **changes, **execution, "dtype": dtype}
    channels = len(encoder.info["bands"])
    # Only shapes: random weights would take time.
    network = nnx.eval_shape(
        lambda: build_encoder(model, channels=channels, rngs=nnx.Rngs(0))
    )
    nnx.update(network, jax.tree.map(jnp.copy, nnx.state(encoder.network)))
    return network


def create_learner(
    job: Measurement, feature: str, plan: Plan, *, recipe: Mapping[str, Any]
) -> Learner:
    """A copy of `job.encoder`'s network with a new linear layer."""
    read = job.encoder.reading
    info, num_classes = job.encoder.info, len(job.parts.class_names)
    bands = Bands.of(info)
    changes = {"encoder_norm": False} if feature == "mean" else {}
    depth = info["architecture"]["depth"]

    def build(rngs):
        encoder = copied_network(job.encoder, dtype=recipe["dtype"], **changes)
        return Classifier(
            encoder,
            num_classes,
            feature=feature,
            head_std=recipe["head_std"],
            rngs=rngs,
        )

    names = ("layer_decay", "weight_decay", "b1", "b2")
    optimizer = Optimizer(
        create_adamw(
            plan.learning_rate,
            depth=depth,
            **{name: recipe[name] for name in names},
        ),
        plan.learning_rate,
    )
    graphdef, state = create_train_state(build, optimizer, jax.random.key(job.seed))
    mesh = create_mesh(recipe["batch_size"])
    whole, divided = replicated(mesh), by_batch(mesh)
    step = functools.partial(
        finetune_step,
        graphdef=graphdef,
        optimizer=optimizer,
        normalize=bands.normalize,
        num_classes=num_classes,
        depth=depth,
        recipe=recipe,
    )

    rows = whole if job.batch_size % mesh.size else divided

    @functools.partial(jax.jit, in_shardings=(whole, rows, rows))
    def scores(state, images, gsd):
        network = nnx.merge(graphdef, state.params, state.batch_stats)
        return network(bands.normalize(images), gsd=gsd)

    step = jax.jit(
        step,
        in_shardings=(whole, divided, divided, divided),
        out_shardings=whole,
        donate_argnums=0,
    )
    return Learner(
        state=jax.device_put(state, whole),
        step=lambda state, images, *rest: step(state, read(images), *rest),
        predict=lambda state, images, gsd: scores(state, read(images), gsd),
        feature_scaling="layer norm (fc_norm)" if feature == "mean" else "none",
    )


def finetune_step(
    state: TrainState,
    images: Shaped[Array, "batch height width channels"],
    gsd: Float[Array, "batch 2"],
    labels: Int[Array, " batch"],
    *,
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    normalize: Callable,
    num_classes: int,
    depth: int,
    recipe: Mapping[str, Any],
) -> tuple[TrainState, Float[Array, ""]]:
    """One update, and the mean cross-entropy with mixed targets before it."""
    step_key = jax.random.fold_in(state.key, state.step)
    erase_key, mix_key, drop_key = jax.random.split(step_key, 3)
    x = random_erasing(
        erase_key, normalize(images), probability=recipe["random_erasing"]
    )
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, num_classes), recipe["label_smoothing"]
    )
    x, targets = mix(
        mix_key,
        x,
        targets,
        mixup=recipe["mixup"],
        cutmix=recipe["cutmix"],
        switch=recipe["mixup_switch"],
    )
    scales = None
    if recipe["drop_path"]:
        scales = drop_path_scales(
            drop_key, rate=recipe["drop_path"], depth=depth, batch=len(labels)
        )

    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.batch_stats)
        scores = model(x, gsd=gsd, branch_scales=scales)
        return optax.softmax_cross_entropy(scores, targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    state = updated(state, grads, state.batch_stats, finite=finite, optimizer=optimizer)
    return state, loss
