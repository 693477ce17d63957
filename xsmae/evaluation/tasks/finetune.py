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
from xsmae.evaluation.fitting import optimizers
from xsmae.evaluation.fitting.augment import mix, random_erasing
from xsmae.evaluation.fitting.fit import Learner
from xsmae.evaluation.fitting.recipe import Plan
from xsmae.evaluation.fitting.step import step_by
from xsmae.evaluation.measure import Measurement
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.models.build import build_encoder
from xsmae.models.drop_path import drop_path_scales
from xsmae.models.linear import PooledLinear
from xsmae.models.pooling import pool
from xsmae.models.vit import Encoder
from xsmae.optim import Optimizer
from xsmae.sharding import by_batch, create_mesh, replicated
from xsmae.train_state import TrainState, create_train_state
from xsmae.weights.classifier import TrainedClassifier
from xsmae.weights.description import check_network
from xsmae.weights.encoder import Encoder as TrainedEncoder
from xsmae.weights.head_files import tensors_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Shaped


class Classifier(PooledLinear):
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
        super().__init__(
            encoder.embed_dim,
            num_classes,
            feature=feature,
            head_std=head_std,
            rngs=rngs,
        )
        self.encoder, self.feature = encoder, feature

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        gsd: Float[Array, "batch 2"],
        branch_scales: Float[Array, "depth 2 batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Scores of normalised images; `branch_scales` is for training only."""
        tokens = self.encoder(images, gsd=gsd, branch_scales=branch_scales)
        return self.scores(pool(tokens.astype(jnp.float32), self.feature))


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

    optimizer = optimizers.adamw(plan, recipe, depth=depth)
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

    def trained(state):
        tuned = {
            **info,
            "architecture": {**info["architecture"], **changes},
            "pooling": feature,
            "run": {**info.get("run", {}), "trained_with_head": "finetuned"},
        }
        network = check_network(tuned)
        nnx.update(network, state.params["encoder"])
        head = {name: state.params[name] for name in state.params if name != "encoder"}
        return TrainedClassifier(
            "finetuned",
            tensors_of(nnx.State(head)),
            {"dtype": recipe["dtype"]},
            TrainedEncoder(network, tuned),
        )

    return Learner(
        state=jax.device_put(state, whole),
        step=lambda state, images, *rest: step(state, read(images), *rest),
        predict=lambda state, images, gsd: scores(state, read(images), gsd),
        feature_scaling="layer norm (fc_norm)" if feature == "mean" else "none",
        trained=trained,
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

    def loss_fn(params, batch_stats):
        model = nnx.merge(graphdef, params, batch_stats)
        scores = model(x, gsd=gsd, branch_scales=scales)
        return optax.softmax_cross_entropy(scores, targets).mean(), batch_stats

    return step_by(loss_fn, state, optimizer=optimizer)
