"""Builds a config: the mesh, the model, the optimiser, the compiled functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xsmae.bands import Bands
from xsmae.config import check_ranges, flatten
from xsmae.data.photometric import SATURATED
from xsmae.data.pipeline import make_batches
from xsmae.data.records import Source
from xsmae.data.views import ViewSampler
from xsmae.errors import UserError
from xsmae.methods import METHODS, Method, Pictures
from xsmae.models.build import EXECUTION, with_group_indices
from xsmae.models.masking import valid_patches_needed
from xsmae.models.pooling import POOLINGS, pool
from xsmae.optim import Optimizer, create_optimizer
from xsmae.sharding import (
    by_batch,
    create_mesh,
    of_state,
    on_mesh,
    put_whole,
    replicated,
)
from xsmae.train_state import (
    TrainState,
    create_train_state,
    draw_noise,
    prepare_views,
    train_step,
)

# The fields of a batch that the step reads; the host uses the others. Only batches of
# images that may lack pixels have `valid`.
STEP_FIELDS = ("image", "gsd", "box", "flip", "valid")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a run and its warm-up in steps, and the peak learning rate."""

    num_steps: int
    warmup_steps: int
    learning_rate: float
    steps_per_epoch: float


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Compiled functions and sizes of a run.

    step(state, batch) -> (state, metrics). initial_state() -> the state of step 0.
    initial_params() -> only its parameters, without memory for the rest.
    state_shapes() -> its shapes and placement.
    predict(state, batch) -> the `Pictures` of the batch; None without pictures.
    encode(params, images, gsd) -> {"cls", "mean"} features of whole uint8 images,
    computed like the exported encoder: in float32, whatever `config.model.dtype`.
    """

    mesh: Mesh
    schedule: Schedule
    graphdef: nnx.GraphDef
    step: Callable
    initial_state: Callable[[], TrainState]
    initial_params: Callable[[], nnx.State]
    state_shapes: Callable[[], TrainState]
    predict: Callable[..., Pictures] | None
    encode: Callable


def create_sampler(config: ml_collections.ConfigDict) -> ViewSampler:
    """The sampler for `config.views`; raises UserError for a wrong field."""
    num_views = _method(config).num_views
    views = config.views.to_dict() | {"size": crop_size(config)}
    if views.get("saturation") and {*config.bands} != {*SATURATED}:
        raise UserError(
            f"views.saturation={views['saturation']} needs the bands "
            f"{', '.join(SATURATED)}, but these are {', '.join(config.bands)}: give 0"
        )
    try:
        return ViewSampler(num_views=num_views, **views)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.{error}") from None


def crop_size(config: ml_collections.ConfigDict) -> int:
    """The side of a crop in pixels: that of a view, or of the larger target."""
    return config.views.size * _method(config).target_scale(config.model)


def create_schedule(config: ml_collections.ConfigDict, *, num_images: int) -> Schedule:
    """Converts epochs to steps, and scales the learning rate by the batch size."""
    per_epoch = num_images / config.batch_size
    num_steps, warmup = config.num_steps, config.optim.warmup_steps
    if num_steps is None:
        num_steps = math.ceil(config.num_epochs * per_epoch)
    if warmup is None:
        warmup = round(config.optim.warmup_epochs * per_epoch)
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps}, expected 1 or more")
    scale = config.batch_size / config.optim.learning_rate_batch
    return Schedule(
        num_steps=num_steps,
        warmup_steps=warmup,
        learning_rate=config.optim.learning_rate * scale,
        steps_per_epoch=per_epoch,
    )


def create_trainer(
    config: ml_collections.ConfigDict,
    *,
    num_images: int,
    devices: Sequence[jax.Device] | None = None,
) -> Trainer:
    """Builds everything of a run except its data, for all devices or `devices`."""
    method = _method(config)
    count = jax.device_count() if devices is None else len(devices)
    method.check_used(flatten(config.to_dict()))
    check_ranges(config, count, of_method=method.ranges)
    mesh = create_mesh(config.batch_size, config.mesh, devices=devices)
    schedule = create_schedule(config, num_images=num_images)
    optimizer = _optimizer(config, schedule)
    size, channels = config.views.size, len(config.bands)
    bands = Bands.of(config)
    with _as_user_error():
        model = with_group_indices(config.model.to_dict(), bands.names)
    loss = config.loss.to_dict()
    preparation = {"bands": bands, "target_scale": method.target_scale(model)}

    def build(rngs: nnx.Rngs, **changes: Any) -> nnx.Module:
        fields = model | changes
        return method.build(fields, channels=channels, view_size=size, rngs=rngs)

    with _as_user_error():
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        graphdef, _, _ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
        exported = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0), **EXECUTION)))
        noise_size = abstract.noise_size(size, size)

    def initial_state():
        return create_train_state(build, optimizer, jax.random.key(config.seed))[1]

    shapes = jax.eval_shape(initial_state)
    placed = of_state(mesh, shapes)

    step = functools.partial(
        on_mesh(train_step, mesh),
        graphdef=graphdef,
        losses=functools.partial(method.losses, model=model, loss=loss),
        weights={name: term["weight"] for name, term in loss.items()},
        optimizer=optimizer,
        noise_size=noise_size,
        accumulation_steps=config.optim.accumulation_steps,
        **preparation,
    )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def predict(state, batch):
        views = prepare_views(batch, **preparation)
        network = nnx.merge(graphdef, state.params, state.batch_stats)
        output = network(views, draw_noise(jax.random.key(0), views, noise_size))
        return method.pictures(output, views, model=model, loss=loss)

    @functools.partial(
        jax.jit,
        in_shardings=(placed.params, by_batch(mesh), by_batch(mesh)),
        out_shardings=replicated(mesh),
    )
    def features(params, images, gsd):
        stats = jax.tree.map(jnp.zeros_like, shapes.batch_stats)
        encoder = nnx.merge(exported, params, stats).encoder
        values = bands.rescale(images)
        if bands.has_valid:
            values = bands.fill(values)
        tokens = encoder(bands.normalize(values), gsd=gsd)
        return {pooling: pool(tokens, pooling) for pooling in POOLINGS}

    step = jax.jit(
        step,
        in_shardings=(placed, by_batch(mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )
    with _as_user_error():  # find mismatches before reading any image
        step.eval_shape(shapes, batch_shapes(config))
    return Trainer(
        mesh=mesh,
        schedule=schedule,
        graphdef=graphdef,
        step=step,
        initial_state=jax.jit(initial_state, out_shardings=placed),
        # In one program, so that XLA leaves out the moments, which are not returned.
        initial_params=jax.jit(
            lambda: initial_state().params, out_shardings=placed.params
        ),
        state_shapes=lambda: jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding
            ),
            shapes,
            placed,
        ),
        predict=None if method.pictures is None else predict,
        encode=lambda params, images, gsd: features(
            params, put_whole(images, by_batch(mesh)), put_whole(gsd, by_batch(mesh))
        ),
    )


def step_fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a batch that the step reads."""
    return {name: batch[name] for name in STEP_FIELDS if name in batch}


def min_valid_patches(config: ml_collections.ConfigDict) -> int:
    """How many patches of a view must be valid, so that all visible ones can be.

    A method without masks reads all patches, and needs as many valid ones as the other
    methods do by default.
    """
    model = config.model
    groups = len(model.get("channel_groups", ()))
    if model.get("spatial_mask", False):
        groups = 0  # all groups have one mask
    return valid_patches_needed(
        (config.views.size // model.patch_size) ** 2,
        model.get("mask_ratio", 0.75),
        groups=max(groups, 1),
    )


def batch_shapes(
    config: ml_collections.ConfigDict,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the batch fields that the step reads."""
    views = (config.batch_size, _method(config).num_views)
    size, bands = crop_size(config), Bands.of(config)
    image = (*views, size, size, len(bands.names))
    valid = {"valid": jax.ShapeDtypeStruct(image[:-1], bool)} if bands.has_valid else {}
    return {
        "image": jax.ShapeDtypeStruct(image, np.dtype(bands.dtype)),
        "gsd": jax.ShapeDtypeStruct((*views, 2), np.float32),
        "box": jax.ShapeDtypeStruct((*views, 4), np.float32),
        "flip": jax.ShapeDtypeStruct((config.batch_size, 2), bool),
        **valid,
    }


def batches_of(
    config: ml_collections.ConfigDict,
    source: Source,
    sampler: ViewSampler,
    start: int,
    stop: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps `start` to `stop` of a run; see `make_batches`."""
    return make_batches(
        source,
        sampler,
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start,
        num_steps=stop,
        max_rejected_fraction=config.input.max_rejected_fraction,
        min_valid=min_valid(config),
        num_workers=config.input.num_workers,
        num_threads=config.input.num_threads,
        prefetch=config.input.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def first_samples(
    config: ml_collections.ConfigDict, source: Source, sampler: ViewSampler, count: int
) -> dict[str, np.ndarray]:
    """The first `count` samples of a run, for pictures."""
    batches = make_batches(
        source,
        sampler,
        seed=config.seed,
        batch_size=min(count, len(source)),
        start_step=0,
        num_steps=1,
        max_rejected_fraction=config.input.max_rejected_fraction,
        min_valid=min_valid(config),
    )
    return next(batches)


def min_valid(config: ml_collections.ConfigDict) -> float:
    """The smallest valid part of a view's pixels, so that all visible tokens are valid.

    A patch is valid if half of its pixels are. With a part f of the pixels valid, at
    least 2 f - 1 of the patches are. 8-bit images have no invalid pixels.
    """
    if (config.get("dtype") or "uint8") == "uint8":
        return 0.0
    patches = (config.views.size // config.model.patch_size) ** 2
    return 0.5 + min_valid_patches(config) / patches / 2


def _method(config: ml_collections.ConfigDict) -> Method:
    if config.method not in METHODS:
        raise UserError(
            f"method={config.method!r}, expected one of {', '.join(METHODS)}"
        )
    return METHODS[config.method]


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """Turns errors of networks and losses about their arguments into UserErrors."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"the config's fields do not fit together: {message}") from None


def _optimizer(config: ml_collections.ConfigDict, schedule: Schedule) -> Optimizer:
    optim = config.optim
    with _as_user_error():
        return create_optimizer(
            learning_rate=schedule.learning_rate,
            num_steps=schedule.num_steps,
            warmup_steps=schedule.warmup_steps,
            weight_decay=optim.weight_decay,
            b1=optim.b1,
            b2=optim.b2,
            clip_norm=optim.clip_norm,
        )
