"""The published probe's optimiser and classifier against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.fitting.optimizers import create_lars
from xsmae.evaluation.tasks.published_probe import most_movement
from xsmae.models.linear import LinearProbe


def test_lars_is_the_papers_formula():
    """You et al. 2017: v = m v + rate * local rate * gradient; w = w - v.

    The local rate is trust * |w| / |gradient|; biases have none.
    """
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    moment = {name: np.zeros_like(value) for name, value in weights.items()}
    rates = [0.5, 0.3, 0.2, 0.1]
    optimizer = create_lars(
        lambda count: jnp.array(rates)[count],
        momentum=0.9,
        trust_coefficient=0.001,
        weight_decay=0.0,
    )
    params = jax.tree.map(jnp.asarray, weights)
    state = optimizer.init(params)
    for rate in rates:
        grads = {name: rng.normal(size=w.shape) for name, w in weights.items()}
        given = jax.tree.map(jnp.asarray, grads)
        updates, state = optimizer.update(given, state, params)
        params = optax.apply_updates(params, updates)
        local = {
            "kernel": 0.001
            * np.linalg.norm(weights["kernel"])
            / np.linalg.norm(grads["kernel"]),
            "bias": 1.0,
        }
        for name in weights:
            moment[name] = 0.9 * moment[name] + rate * local[name] * grads[name]
            weights[name] = weights[name] - moment[name]
            np.testing.assert_allclose(params[name], weights[name], rtol=2e-5)


def test_the_probes_batch_norm():
    rng = np.random.default_rng(0)
    model = LinearProbe(
        4, 3, momentum=0.1, epsilon=1e-6, head_std=0.01, rngs=nnx.Rngs(0)
    )
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(
        nnx.state(model, nnx.Param)
    )}  # fmt: skip
    assert names == {"head.kernel", "head.bias"}  # no scale and bias
    np.testing.assert_array_equal(model.head.bias[...], 0)
    assert 0.003 < jnp.std(model.head.kernel[...]) < 0.03
    mean, var = np.zeros(4), np.ones(4)
    for _ in range(3):
        x = rng.normal(3.0, 2.0, (64, 4))
        found = model(jnp.asarray(x), training=True)
        normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
        expected = normal @ np.asarray(model.head.kernel[...])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], var, rtol=1e-5)
    x = rng.normal(size=(5, 4))
    expected = (x - mean) / np.sqrt(var + 1e-6) @ np.asarray(model.head.kernel[...])
    np.testing.assert_allclose(model(x, training=False), expected, atol=1e-5)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-5)  # unchanged


def test_the_most_that_lars_moves_a_matrix():
    """Gradients along the weights nearly reach the bound."""
    config = recipe.published_probe()
    plan = recipe.create_plan(config, num_images=3 * config.batch_size)
    most = most_movement(plan, config)
    optimizer = create_lars(
        plan.learning_rate,
        momentum=config.momentum,
        trust_coefficient=config.trust_coefficient,
        weight_decay=0.0,
    )
    start = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(-weights, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    carry = start, optimizer.init(start)
    (end, _), _ = jax.lax.scan(step, carry, length=plan.num_steps)
    grown = float(jnp.log(jnp.linalg.norm(end) / jnp.linalg.norm(start)))
    assert plan.num_steps == 150
    assert 0.9 * most < grown <= most
