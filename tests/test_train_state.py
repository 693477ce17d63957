"""The training step: learning, accumulation, skipped updates, precision, rates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from xsmae.configs import common

from tests.support.models import MODEL, some_batch
from xsmae.bands import BANDS, Bands
from xsmae.methods import METHODS
from xsmae.optim import create_optimizer, decay_mask
from xsmae.train_state import create_train_state, prepare_views, train_step
from xsmae.trainer import batch_shapes, create_trainer

LOSS = {
    "reconstruction": {"weight": 1.0, "norm_pix_loss": True, "views": "mean"},
    "contrastive": {
        "weight": 1.0,
        "temperature": 0.5,
        "positive_in_denominator": True,
        "groups": 1,
    },
    "cross_prediction": {"weight": 1.0, "stop_gradient": True, "aligned": True},
}
PUBLISHED = {
    "norm_style": "post",
    "norm_epsilon": 1e-5,
    "encoder_norm": False,
    "predictor_norm": "batch_norm",
    "projection_dim": 0,
}


@functools.cache
def trainer(
    method="cross_scale_mae",
    *,
    accumulation_steps=1,
    learning_rate=1e-2,
    weights=(1.0, 1.0, 1.0),
    published=False,
    optimizer_kind="adamw",
    **changes,
):
    """(jitted step, initial state) of a tiny model."""
    model = {**MODEL, **(PUBLISHED if published else {}), **changes}
    names = list(LOSS) if method == "cross_scale_mae" else ["reconstruction"]
    optimizer = create_optimizer(
        learning_rate=learning_rate, num_steps=200, warmup_steps=5,
        weight_decay=0.05, b1=0.9, b2=0.95,
    )  # fmt: skip
    if optimizer_kind == "sgd":  # its update is the gradient
        optimizer = dataclasses.replace(optimizer, transform=optax.sgd(1.0))
    graphdef, state = create_train_state(
        functools.partial(_build, method, tuple(model.items())),
        optimizer,
        jax.random.key(0),
    )
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        losses=functools.partial(METHODS[method].losses, model=model, loss=LOSS),
        weights=dict(zip(names, weights, strict=False)),
        optimizer=optimizer,
        noise_size=16,
        bands=Bands(BANDS, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)),
        accumulation_steps=accumulation_steps,
    )
    return jax.jit(step), state


def _build(method, model, rngs):
    return METHODS[method].build(dict(model), channels=3, view_size=16, rngs=rngs)


def equal(a, b):
    same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)
    return jax.tree.all(same)


@pytest.mark.parametrize("published", [True, False])
def test_one_batch_is_overfitted(published):
    step, state = trainer(published=published)
    batch, losses = some_batch(4), []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append({k: float(v) for k, v in metrics.items()})
    for name in LOSS:
        assert losses[-1][f"loss/{name}"] < losses[0][f"loss/{name}"] - 0.05, name
    assert losses[-1]["loss"] < losses[0]["loss"] - 1
    assert int(state.step) == 150
    if published:
        assert np.abs(jax.tree.leaves(state.batch_stats)[0]).max() > 0


def test_total_is_the_weighted_sum_and_views_add_up():
    step, state = trainer(weights=(1.0, 0.5, 2.0))
    _, metrics = step(state, some_batch())
    m = {name: float(value) for name, value in metrics.items()}
    total = m["loss/reconstruction"] + 0.5 * m["loss/contrastive"]
    total += 2 * m["loss/cross_prediction"]
    assert m["loss"] == pytest.approx(total, rel=1e-5)
    views = (m["loss/reconstruction_view1"] + m["loss/reconstruction_view2"]) / 2
    assert m["loss/reconstruction"] == pytest.approx(views, rel=1e-5)


def test_a_term_of_weight_0_cannot_spoil_the_total():
    step, state = trainer(weights=(1.0, 0.0, 1.0))
    batch = some_batch(1)  # without negatives, the contrastive loss is 0 or not finite
    published_step, published = trainer(weights=(1.0, 0.0, 1.0), published=True)
    for run, before in ((step, state), (published_step, published)):
        after, metrics = run(before, batch)
        assert np.isfinite(metrics["loss"])
        assert int(metrics["nonfinite"]) == 0
        assert not equal(after.opt_state, before.opt_state)


def test_masks_differ_from_step_to_step_and_repeat_with_the_seed():
    step, state = trainer(learning_rate=0.0)
    batch = some_batch()
    after, first = step(state, batch)
    _, second = step(after, batch)
    _, again = step(state, batch)
    assert float(first["loss"]) == float(again["loss"])
    assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize("method", ["mae", "cross_scale_mae"])
def test_accumulation_equals_the_large_batch(method):
    """For losses that are means over samples, so without the contrastive one."""
    options = {"weights": (1.0, 0.0, 1.0), "optimizer_kind": "sgd"}
    num_views = METHODS[method].num_views
    batch = some_batch(8, num_views)
    whole_step, state = trainer(method, **options)
    whole, whole_metrics = whole_step(state, batch)
    parts_step, _ = trainer(method, accumulation_steps=4, **options)
    parts, parts_metrics = parts_step(state, batch)
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)
    for name in ("loss/reconstruction", "grad_norm"):
        assert float(whole_metrics[name]) == pytest.approx(
            float(parts_metrics[name]), rel=1e-4
        )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_accumulates_in_float32(name):
    """In float32 there is no cast between a parameter and its use."""
    config = common.get_common(METHODS[name].presets[-1], "tiny", name)
    config.batch_size = 8
    config.optim.accumulation_steps = 2
    config.views.size = 16
    config.model.update(patch_size=4, embed_dim=32, num_heads=2, dtype="float32")
    if name == "scale_mae":
        config.model.update(head_dim=8, target_scale=2)
    trainer = create_trainer(config, num_images=4000)
    state, metrics = jax.eval_shape(
        trainer.step, trainer.state_shapes(), batch_shapes(config)
    )
    assert state == trainer.state_shapes()
    assert metrics["loss"].shape == ()


def test_accumulation_holds_one_gradient():
    """Gradients of parts are added in place; else it takes 1.2x the parameters."""
    step, state = trainer(
        "mae", accumulation_steps=4, optimizer_kind="sgd", embed_dim=128, depth=16
    )
    compiled = step.lower(state, some_batch(8, 1)).compile()
    parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * parameters


def test_a_nonfinite_loss_skips_the_update_and_is_counted():
    step, state = trainer(published=True)
    batch = some_batch()
    state, _ = step(state, batch)
    broken = dataclasses.replace(
        state, params=jax.tree.map(lambda x: x.at[...].set(jnp.nan), state.params)
    )
    after, metrics = step(broken, batch)
    assert int(metrics["nonfinite"]) == int(metrics["nonfinite_in_a_row"]) == 1
    assert equal(after.opt_state, broken.opt_state)
    assert equal(after.batch_stats, broken.batch_stats)
    assert int(after.step) == int(broken.step) + 1
    again, metrics = step(after, batch)
    assert int(metrics["nonfinite_in_a_row"]) == 2
    healed = dataclasses.replace(again, params=state.params)
    healed, metrics = step(healed, batch)
    assert int(metrics["nonfinite_in_a_row"]) == 0
    assert int(metrics["nonfinite"]) == 2
    assert not equal(healed.params, state.params)


def test_learning_rate_follows_the_updates_done():
    optimizer = create_optimizer(
        learning_rate=1.0, num_steps=100, warmup_steps=10,
        weight_decay=0.0, b1=0.9, b2=0.95,
    )  # fmt: skip
    rates = [float(optimizer.learning_rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="warm-up of 100 steps in a run of 100"):
        create_optimizer(
            learning_rate=1.0, num_steps=100, warmup_steps=100,
            weight_decay=0.0, b1=0.9, b2=0.95,
        )  # fmt: skip


def test_decay_leaves_biases_and_norms_alone():
    _, state = trainer(published=True)
    decayed = jax.tree_util.tree_leaves_with_path(decay_mask(state.params))
    for path, flag in decayed:
        name = jax.tree_util.keystr(path)
        assert flag == ("kernel" in name or "token" in name), name
    assert {flag for _, flag in decayed} == {True, False}


def test_clipping_bounds_the_update():
    options = {
        "learning_rate": 1.0, "num_steps": 10, "warmup_steps": 0,
        "weight_decay": 0.0, "b1": 0.0, "b2": 0.0,
    }  # fmt: skip
    params = {"kernel": jnp.ones(4)}
    grads = {"kernel": jnp.full(4, 100.0)}
    for clip, norm in ((0.0, 200.0), (1.0, 1.0)):
        transform = create_optimizer(**options, clip_norm=clip).transform
        _, opt_state = transform.update(grads, transform.init(params), params)
        moments = [
            x for x in jax.tree.leaves(opt_state) if getattr(x, "shape", ()) == (4,)
        ]
        assert np.linalg.norm(moments[0]) == pytest.approx(norm, rel=1e-5)


def test_views_are_normalised_from_bytes():
    views = prepare_views(
        some_batch(), bands=Bands(BANDS, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    )
    image = some_batch()["image"].astype(np.float64) / 255
    expected = (image - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.3]
    np.testing.assert_allclose(views.images, expected, atol=1e-4)


def test_bfloat16_step_is_near_float32():
    batch = some_batch()
    step, state = trainer()
    half_step, _ = trainer(dtype="bfloat16")
    _, full = step(state, batch)
    after, half = half_step(state, batch)
    for name in ("loss", "loss/reconstruction", "loss/contrastive"):
        assert float(half[name]) == pytest.approx(float(full[name]), rel=0.03)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}


def test_nnx_definition_survives_the_round_trip():
    """The compiled step depends only on the definition; equal ones compile once."""
    build = functools.partial(_build, "cross_scale_mae", tuple(MODEL.items()))
    first, _, _ = nnx.split(build(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    second, _, _ = nnx.split(build(nnx.Rngs(1)), nnx.Param, nnx.BatchStat)
    assert hash(first) == hash(second)
    assert first == second


def test_initial_params_are_those_of_the_state_without_its_moments():
    config = common.get_common("corrected", "tiny")
    config.model.update(
        depth=2, embed_dim=64, num_heads=2, decoder_depth=1, reference_gsd=1.0
    )
    built = create_trainer(config, num_images=1000)
    params, state = built.initial_params(), built.initial_state()
    assert equal(params, state.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    memory = built.initial_params.lower().compile().memory_analysis()
    assert size <= memory.output_size_in_bytes < 1.1 * size
