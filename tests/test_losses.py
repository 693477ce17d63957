"""Every loss compared with a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmae import losses


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction(norm_pix_loss):
    pred, target = normal(3, 2, 6, 12), normal(3, 2, 6, 12, seed=1)
    mask = (normal(3, 2, 6, seed=2) > 0).astype(np.float32)
    per_view = losses.reconstruction(pred, target, mask, norm_pix_loss=norm_pix_loss)
    if norm_pix_loss:
        mean = target.mean(-1, keepdims=True)
        std = np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
        target = (target - mean) / std
    error = ((pred - target) ** 2).mean(-1)
    for view in range(2):
        hidden = mask[:, view] == 1
        np.testing.assert_allclose(
            per_view[view], error[:, view][hidden].mean(), rtol=1e-5
        )


def test_reconstruction_ignores_visible_patches():
    pred, target = normal(3, 1, 6, 12), normal(3, 1, 6, 12, seed=1)
    mask = np.tile([0.0, 1, 1, 1, 1, 0], (3, 1, 1))
    loss = losses.reconstruction(pred, target, mask, norm_pix_loss=False)
    pred[:, :, [0, 5]] = 1e3
    np.testing.assert_array_equal(
        loss, losses.reconstruction(pred, target, mask, norm_pix_loss=False)
    )


def test_over_views():
    per_view = jnp.array([1.0, 3.0])
    assert losses.over_views(per_view, "sum") == 4
    assert losses.over_views(per_view, "mean") == 2
    with pytest.raises(ValueError, match="expected one of"):
        losses.over_views(per_view, "max")


def numpy_contrastive(embedding, temperature, positive_in_denominator):
    z = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    batch = len(z)
    z = np.concatenate([z[:, 0], z[:, 1]])
    total = 0
    for i in range(2 * batch):
        similar = np.exp(z @ z[i] / temperature)
        positive = (i + batch) % (2 * batch)
        others = [j for j in range(2 * batch) if j not in (i, positive)]
        denominator = similar[others].sum()
        denominator += similar[positive] if positive_in_denominator else 1e-8
        total += -np.log(similar[positive] / denominator)
    return total / (2 * batch)


@pytest.mark.parametrize("positive_in_denominator", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_contrastive(positive_in_denominator, temperature):
    embedding = normal(5, 2, 8)
    found = losses.contrastive(
        embedding,
        temperature=temperature,
        positive_in_denominator=positive_in_denominator,
    )
    expected = numpy_contrastive(embedding, temperature, positive_in_denominator)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_standard_contrastive_equals_optax():
    embedding = normal(6, 2, 16)
    z = np.concatenate([embedding[:, 0], embedding[:, 1]])
    labels = np.tile(np.arange(6), 2)
    expected = optax.losses.ntxent(jnp.asarray(z), jnp.asarray(labels), 0.5)
    found = losses.contrastive(embedding, temperature=0.5, positive_in_denominator=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_contrastive_groups_are_batches_of_their_own():
    embedding = normal(6, 2, 8)
    options = {"temperature": 0.5, "positive_in_denominator": True}
    parts = [losses.contrastive(embedding[i : i + 3], **options) for i in (0, 3)]
    found = losses.contrastive(embedding, groups=2, **options)
    np.testing.assert_allclose(found, np.mean(parts), rtol=1e-5)
    whole = losses.contrastive(embedding, **options)
    assert abs(float(whole - found)) > 0.1
    with pytest.raises(ValueError, match="groups="):
        losses.contrastive(embedding, groups=4, **options)


def test_contrastive_survives_a_zero_vector():
    embedding = normal(4, 2, 8)
    embedding[0] = 0
    gradient = jax.grad(
        lambda z: losses.contrastive(z, temperature=0.5, positive_in_denominator=True)
    )(jnp.asarray(embedding))
    assert np.isfinite(gradient).all()


def test_cross_prediction_token_by_token():
    predicted, target = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    found = losses.cross_prediction(predicted, target, stop_gradient=False)
    np.testing.assert_allclose(found, ((predicted - target) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_gradient_stops_where_intended(aligned, stop_gradient):
    predicted, target = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    box = jnp.tile(jnp.array([0.1, 0.2, 0.8, 0.9]), (3, 1)) if aligned else None

    def loss(predicted, target):
        return losses.cross_prediction(
            predicted, target, stop_gradient=stop_gradient, box=box, grid=(2, 2)
        )

    of_predicted, of_target = jax.grad(loss, argnums=(0, 1))(predicted, target)
    assert np.abs(of_predicted).max() > 0
    assert (np.abs(of_target).max() == 0) == stop_gradient


def test_aligned_with_the_whole_view_is_token_by_token():
    predicted, target = normal(3, 6, 5), normal(3, 6, 5, seed=1)
    box = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0]), (3, 1))
    found = losses.cross_prediction(
        predicted, target, stop_gradient=True, box=box, grid=(2, 3)
    )
    np.testing.assert_allclose(found, ((predicted - target) ** 2).mean(), rtol=1e-5)


@given(
    top=st.floats(0, 0.5), left=st.floats(0, 0.5),
    height=st.floats(0.2, 0.5), width=st.floats(0.2, 0.5),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_sampling_a_linear_map_gives_the_ground_position(top, left, height, width):
    """Bilinear sampling of a linear map is exact between the outermost centres."""
    rows, columns = 6, 4
    y, x = np.meshgrid(
        (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns,
        indexing="ij",
    )  # fmt: skip
    tokens = np.stack([y, x], -1).reshape(1, -1, 2).astype(np.float32)
    box = jnp.array([[top, left, top + height, left + width]])
    sampled, inside = losses.sample_tokens(jnp.asarray(tokens), box, grid=(6, 4))
    assert inside.all()
    ground_y = np.clip(top + height * y, 0.5 / rows, 1 - 0.5 / rows)
    ground_x = np.clip(left + width * x, 0.5 / columns, 1 - 0.5 / columns)
    expected = np.stack([ground_y, ground_x], -1).reshape(1, -1, 2)
    np.testing.assert_allclose(sampled, expected, atol=1e-5)


def test_patches_outside_view_1_do_not_count():
    predicted, target = normal(1, 4, 5), normal(1, 4, 5, seed=1)
    box = jnp.array([[0.0, 0.0, 1.0, 2.0]])  # its right half lies outside
    _, inside = losses.sample_tokens(jnp.asarray(target), box, grid=(2, 2))
    np.testing.assert_array_equal(inside[0], [True, False, True, False])

    def loss(predicted):
        return losses.cross_prediction(
            predicted, target, stop_gradient=True, box=box, grid=(2, 2)
        )

    gradient = jax.grad(loss)(jnp.asarray(predicted))
    assert (np.abs(gradient[0]).max(axis=-1) > 0).tolist() == inside[0].tolist()
    outside = jnp.array([[2.0, 2.0, 3.0, 3.0]])
    assert losses.cross_prediction(
        predicted, target, stop_gradient=True, box=outside, grid=(2, 2)
    ) == 0  # fmt: skip


def test_losses_are_float32_of_bfloat16():
    half = jnp.ones((2, 2, 4, 8), jnp.bfloat16)
    loss = losses.reconstruction(half, half, jnp.ones((2, 2, 4)), norm_pix_loss=True)
    assert loss.dtype == jnp.float32
    loss = losses.contrastive(
        half[:, :, 0], temperature=0.5, positive_in_denominator=True
    )
    assert loss.dtype == jnp.float32
