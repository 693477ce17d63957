"""Segmentation: trains UperNet on an encoder that is frozen, or trained with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xsmae.data.mask_classes import IGNORE
from xsmae.evaluation.fitting import optimizers
from xsmae.evaluation.fitting.fit import Learner
from xsmae.evaluation.fitting.recipe import Plan
from xsmae.evaluation.fitting.step import step_by
from xsmae.evaluation.segmentation.crops import CropSampler, Labelled
from xsmae.evaluation.segmentation.dense import normalized, normalizer
from xsmae.evaluation.segmentation.scaled import nearest
from xsmae.evaluation.segmentation.scores import confusion
from xsmae.evaluation.segmentation.windows import Readable, segment
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.evaluation.tasks.finetune import copied_network
from xsmae.models.drop_path import drop_path_scales
from xsmae.models.taps import tapped_blocks, token_maps
from xsmae.models.upernet import UperNet, norm_for
from xsmae.models.vit import Encoder
from xsmae.ops import resize
from xsmae.optim import Optimizer
from xsmae.sharding import by_batch, create_mesh, replicated
from xsmae.train_state import TrainState, create_train_state

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, UInt8


class Segmenter(nnx.Module):
    """UperNet and, unless it is frozen, the encoder whose tokens it reads."""

    def __init__(
        self, head: UperNet, encoder: Encoder | None, *, blocks: tuple[int, ...]
    ):
        self.head = head
        self.encoder = encoder
        self.tapped = blocks

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        gsd: Float[Array, "batch 2"],
        frozen: Encoder | None = None,
        training: bool,
        branch_scales: Float[Array, "depth 2 batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch height width classes"]:
        """Scores of every pixel of normalised images.

        frozen: the encoder, if the module has none. branch_scales, key: for training,
        of drop path and of dropout.
        """
        taps = token_maps(
            self.encoder if frozen is None else frozen,
            images,
            self.tapped,
            gsd=gsd,
            branch_scales=branch_scales,
        )
        scores = self.head(taps, training=training, key=key)
        return resize.bilinear(scores, images.shape[1:3])


def cross_entropy(
    scores: Float[Array, "batch height width classes"],
    masks: Int[Array, "batch height width"],
) -> Float[Array, ""]:
    """The mean over the pixels of the whole batch that count; 0 if none does."""
    counted = masks != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(
        scores, jnp.where(counted, masks, 0).astype(jnp.int32)
    )
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)


def create_sampler(encoder: FrozenEncoder, recipe: Mapping[str, Any]) -> CropSampler:
    """The random crops of a recipe, normalised as `encoder` reads them."""
    names = ("max_share", "horizontal_flip", "vertical_flip", "quarter_turns")
    return CropSampler(
        size=recipe["crop"],
        scale=recipe["crop_scale"],
        normalize=normalizer(encoder),
        **{name: recipe[name] for name in names},
    )


def create_learner(
    encoder: FrozenEncoder,
    num_classes: int,
    plan: Plan,
    *,
    recipe: Mapping[str, Any],
    frozen: bool,
    seed: int,
) -> Learner:
    """UperNet with random weights on a copy of the encoder's network.

    Its images are crops of `create_sampler`, its labels their masks; `predict` gives
    scores [n, height, width, classes]. With random weights, `encoder` is the control:
    frozen the untrained encoder, else UperNet from random weights.
    """
    batch, depth = recipe["batch_size"], encoder.info["architecture"]["depth"]
    network = copied_network(encoder, dtype=recipe["dtype"])
    fixed = nnx.split(network) if frozen else None

    def build(rngs):
        head = UperNet(
            network.embed_dim,
            num_classes,
            norm=norm_for(batch),
            tap_norm=frozen,
            channels=recipe["channels"],
            dropout=recipe["dropout"],
            dtype=jnp.dtype(recipe["dtype"]),
            rngs=rngs,
        )
        return Segmenter(head, None if frozen else network, blocks=tapped_blocks(depth))

    optimizer = optimizers.adamw(plan, recipe, depth=depth)
    graphdef, state = create_train_state(build, optimizer, jax.random.key(seed))
    mesh = create_mesh(batch)
    whole, divided = replicated(mesh), by_batch(mesh)
    # The weights of a frozen encoder are an argument. As constants they would be part
    # of the compiled program.
    fixed_graph, fixed_state = fixed or (None, nnx.State({}))
    fixed_state = jax.device_put(fixed_state, whole)

    def scores(params, batch_stats, fixed_state, images, gsd, **options):
        # Variables can only be written in the trace that created them: copy them here.
        model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, batch_stats))
        kept = nnx.merge(fixed_graph, fixed_state) if frozen else None
        found = model(images, gsd=gsd, frozen=kept, **options)
        return found, nnx.state(model, nnx.BatchStat)

    step = jax.jit(
        functools.partial(
            segment_step,
            scores=scores,
            optimizer=optimizer,
            drop_path=recipe.get("drop_path", 0.0),
            depth=depth,
        ),
        in_shardings=(whole, whole, divided, divided, divided),
        out_shardings=whole,
        donate_argnums=1,
    )

    @functools.partial(jax.jit, in_shardings=(whole, whole, divided, divided))
    def predict(fixed_state, state, images, gsd):
        return scores(
            state.params, state.batch_stats, fixed_state, images, gsd, training=False
        )[0]

    return Learner(
        state=jax.device_put(state, whole),
        step=functools.partial(step, fixed_state),
        predict=functools.partial(predict, fixed_state),
        feature_scaling="layer norm per block" if frozen else "none",
    )


def segment_step(
    fixed_state: nnx.State,
    state: TrainState,
    images: Float[Array, "batch height width channels"],
    gsd: Float[Array, "batch 2"],
    masks: Int[Array, "batch height width"],
    *,
    scores: Callable,
    optimizer: Optimizer,
    drop_path: float,
    depth: int,
) -> tuple[TrainState, Float[Array, ""]]:
    """One update, and the cross-entropy of the pixels that count before it."""
    step_key = jax.random.fold_in(state.key, state.step)
    dropout_key, drop_key = jax.random.split(step_key)
    scales = None
    if drop_path:
        scales = drop_path_scales(
            drop_key, rate=drop_path, depth=depth, batch=len(images)
        )

    def loss_fn(params, batch_stats):
        found, batch_stats = scores(
            params,
            batch_stats,
            fixed_state,
            images,
            gsd,
            training=True,
            branch_scales=scales,
            key=dropout_key,
        )
        return cross_entropy(found, masks), batch_stats

    return step_by(loss_fn, state, optimizer=optimizer)


@dataclasses.dataclass(frozen=True)
class Guess:
    """The predicted classes of some rows of an image, full width, beside its mask.

    image: the place in the source. top: the first row. The prediction has the size of
    the mask: where the image was resized, the nearest pixel is taken.
    """

    image: int
    top: int
    mask: UInt8[np.ndarray, "rows width"]
    predicted: Int[np.ndarray, "rows width"]


def guesses(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    source: Sequence[Labelled],
    *,
    normalize: Callable[[np.ndarray], np.ndarray],
    recipe: Mapping[str, Any],
) -> Iterator[Guess]:
    """The predicted classes of all images, from overlapping windows.

    predict(images, gsd) -> scores [n, crop, crop, classes]; n is always the recipe's
    `batch_size`. normalize: see `crops.CropSampler`. source: masks may be larger or
    smaller than images, as `scaled.Scaled` makes them.
    """

    def predict_some(images, gsd):
        # One shape for any number of images, so that nothing is compiled again.
        count = len(images)
        missing = (0, recipe["batch_size"] - count)
        images = np.pad(images, [missing, *[(0, 0)] * 3], "edge")
        return predict(images, np.pad(gsd, [missing, (0, 0)], "edge"))[:count]

    waiting: dict[int, tuple[np.ndarray, tuple[int, ...]]] = {}

    def images() -> Iterator[Readable]:
        for index in range(len(source)):
            labelled = source[index]
            values = normalized(labelled, normalize)
            waiting[index] = (labelled.mask, values.shape[:2])
            yield Readable.of(values, tuple(np.broadcast_to(labelled.gsd, 2)))

    strips = segment(
        images(),
        predict_some,
        crop=recipe["crop"],
        overlap=recipe["overlap"],
        batch_size=recipe["batch_size"],
    )
    for strip in strips:
        mask, shape = waiting[strip.image]
        rows, columns = map(nearest, mask.shape, shape)
        bottom = strip.top + len(strip.scores)
        first, last = np.searchsorted(rows, (strip.top, bottom))
        classes = strip.scores.argmax(axis=-1)
        chosen = classes[np.ix_(rows[first:last] - strip.top, columns)]
        yield Guess(strip.image, int(first), mask[first:last], chosen)
        if bottom == shape[0]:
            del waiting[strip.image]


def confusions(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    source: Sequence[Labelled],
    *,
    num_classes: int,
    **how: Any,
) -> Int[np.ndarray, "images classes classes"]:
    """The confusion matrix of every image; the arguments are those of `guesses`."""
    found = np.zeros((len(source), num_classes, num_classes), np.int64)
    for guess in guesses(predict, source, **how):
        found[guess.image] += confusion(guess.mask, guess.predicted, num_classes)
    return found
