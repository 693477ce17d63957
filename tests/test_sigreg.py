"""SIGReg with pixels: the two losses, local crops, directions, training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xsmae.configs import common

from tests.support.models import MODEL, some_batch, some_views
from xsmae import losses
from xsmae.methods import METHODS
from xsmae.models.sigreg import BatchNorm, draw_directions
from xsmae.ops import resize
from xsmae.trainer import create_trainer

METHOD = METHODS["sigreg"]
FIELDS = METHOD.fields("recommended", size="tiny", model=MODEL)
LOSS = FIELDS["loss"]


def model_of(**changes):
    sizes = {"local_crops": 2, "local_scale": 0.5, "local_area": (0.3, 0.8)}
    sizes |= {"projection_hidden_dim": 12, "projection_dim": 6, "directions": 5}
    return {**MODEL, **FIELDS["model"], **sizes, **changes}


def built(**changes):
    return METHOD.build(model_of(**changes), channels=3, view_size=16, rngs=nnx.Rngs(0))


def noise_for(network, batch=3, seed=1):
    shape = (batch, 2, network.noise_size(16, 16))
    return jax.random.uniform(jax.random.key(seed), shape)


def by_loops(z, directions):
    """The formula, one number at a time."""
    batch, found = len(z), []
    for view in range(z.shape[1]):
        for direction in directions.T:
            total = 0.0
            for k in range(17):
                t = 3 * k / 16
                weight = 3 / 16 * math.exp(-t * t / 2) * (0.5 if k in (0, 16) else 1)
                angles = [t * float(direction @ row) for row in z[:, view]]
                real = sum(map(math.cos, angles)) / batch
                imaginary = sum(map(math.sin, angles)) / batch
                total += weight * ((real - math.exp(-t * t / 2)) ** 2 + imaginary**2)
            found.append(batch * total)
    return sum(found) / len(found)


def test_sigreg_is_the_formula():
    rng = np.random.default_rng(0)
    z = rng.normal(0.3, 2, (7, 3, 4))
    directions = rng.normal(size=(4, 5))
    directions /= np.linalg.norm(directions, axis=0)
    found = losses.sigreg(jnp.asarray(z), jnp.asarray(directions))
    assert float(found) == pytest.approx(by_loops(z, directions), rel=1e-4)


def test_sigreg_is_small_only_for_a_normal_distribution():
    rng = np.random.default_rng(0)
    directions = draw_directions(jnp.array([0.25, 0.5]), 8, 64)
    normal = rng.normal(size=(512, 2, 8))
    found = {
        "normal": normal,
        "collapsed": np.zeros((512, 2, 8)),
        "shifted": normal + 1,
        "wide": 2 * normal,
        "one axis": normal * np.array([1] + [0] * 7),
    }
    found = {
        n: float(losses.sigreg(jnp.asarray(z), directions)) for n, z in found.items()
    }
    assert found["normal"] < 1
    assert all(value > 10 for name, value in found.items() if name != "normal"), found


def test_invariance_is_the_distance_to_the_mean_view():
    z = np.random.default_rng(0).normal(size=(5, 3, 4))
    expected = np.mean((z - z.mean(axis=1, keepdims=True)) ** 2)
    assert float(losses.invariance(jnp.asarray(z))) == pytest.approx(expected, rel=1e-5)
    same = jnp.tile(jnp.asarray(z[:, :1]), (1, 3, 1))
    assert float(losses.invariance(same)) < 1e-12


def test_directions_are_unit_vectors_and_new_in_every_step():
    first = np.asarray(draw_directions(jnp.array([0.1, 0.2]), 6, 50))
    np.testing.assert_allclose(np.linalg.norm(first, axis=0), 1, rtol=1e-5)
    again = draw_directions(jnp.array([0.1, 0.2]), 6, 50)
    np.testing.assert_array_equal(first, again)
    for seed in ([0.1, 0.3], [0.3, 0.2]):
        other = np.asarray(draw_directions(jnp.array(seed), 6, 50))
        assert np.abs(other - first).max() > 0.1
    network, views = built(), some_views()
    noise = noise_for(network)
    found = [network(views, n).directions for n in (noise, noise.at[1:].set(0.5))]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (6, 5)


def test_batch_norm_has_one_mean_and_variance_for_each_feature():
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    found = np.asarray(BatchNorm(4)(jnp.asarray(x, jnp.float32)))
    expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("position", ["fixed", "gsd"])
def test_what_is_projected(position):
    """Visible tokens of the two views, and all tokens of the local crops."""
    network = built(position=position)
    views, noise = some_views(), noise_for(network)
    output = network(views, noise)
    assert output.projected.shape == (3, 4, 6)
    assert output.pred.shape[:2] == (3, 2)
    assert float(output.mask.mean()) == pytest.approx(9 / 16)  # 55 % of 16, rounded up
    expected = [output.encoder_tokens[:, view, 1:].mean(axis=1) for view in (0, 1)]
    for box in network.local.boxes(noise[:, 0, 16:-2], (16, 16)):
        images, _ = resize.area_of_boxes(views.images[:, 0], box, (8, 8))
        metres = (box[:, 2:] - box[:, :2]) * views.gsd[:, 0] * 16
        corner = box[:, :2] * views.gsd[:, 0] * 16
        tokens = network.encoder(
            images, gsd=metres / 8, offset=corner / 4 if position == "gsd" else None
        )
        expected.append(tokens[:, 1:].mean(axis=1))
    merged = jnp.stack(expected, axis=1).reshape(12, 16)
    projected = network.projector(merged).reshape(3, 4, 6)
    np.testing.assert_allclose(output.projected, projected, atol=1e-4)


def test_without_local_crops():
    network = built(local_crops=0)
    assert network.noise_size(16, 16) == 16 + 2
    assert network(some_views(), noise_for(network)).projected.shape == (3, 2, 6)


def test_pixels_that_are_not_valid_change_nothing():
    network = built(local_area=(0.25, 0.25))
    views, noise = some_views(), noise_for(network)
    # Boxes of the first sample's crops: the upper left and the lower right quarter.
    noise = noise.at[0, 0, 16:22].set(jnp.array([0.5, 0, 0, 0.5, 0.9999, 0.9999]))
    valid = np.ones(views.images.shape[:-1], bool)
    valid[:, :, :8] = False
    found = []
    for fill in (0.0, 1e3):
        images = jnp.where(valid[..., None], views.images, fill)
        filled = dataclasses.replace(views, images=images, valid=jnp.asarray(valid))
        instead = jnp.full((3, 16), 7.0)
        local = network._local(filled, noise[:, 0, 16:-2], instead=instead)
        np.testing.assert_array_equal(local[0, 0], 7)  # no patch of it is valid
        assert np.abs(local[0, 1] - 7).min() > 0
        found.append(local)
    np.testing.assert_allclose(*found, atol=1e-6)


def test_training_spreads_the_embeddings():
    config = common.get_common("recommended", "tiny", "sigreg")
    config.batch_size, config.views.size, config.num_steps = 16, 16, 100
    config.optim.warmup_steps, config.optim.learning_rate = 5, 6e-2
    config.model.update(
        model_of(local_crops=1, embed_dim=32, directions=64, depth=1, decoder_depth=1)
    )
    config.loss.invariance.weight = config.loss.sigreg.weight = 0.5
    trainer, batch = create_trainer(config, num_images=100), some_batch(16)
    batch["image"][:, 1] = batch["image"][:, 0]
    state, found = trainer.initial_state(), []
    for _ in range(40):
        state, metrics = trainer.step(state, batch)
        found.append({name: float(value) for name, value in metrics.items()})
    first, last = found[0], found[-1]
    weighted = zip((1, 0.5, 0.5), [f"loss/{name}" for name in LOSS], strict=True)
    assert first["loss"] == pytest.approx(sum(w * first[n] for w, n in weighted))
    for name, part in (("reconstruction", 0.95), ("sigreg", 0.6), ("", 0.9)):
        name = f"loss/{name}".removesuffix("/")
        assert last[name] < part * first[name], name
