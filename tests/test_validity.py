"""Images with invalid pixels: what such a pixel holds reaches nothing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx
from xsmae.configs import common

from tests.support.models import MODEL
from xsmae import losses
from xsmae.bands import BANDS, UNITS, Bands
from xsmae.config import check_ranges
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.methods.scale_mae import frequencies_of
from xsmae.models.build import with_group_indices
from xsmae.models.masking import random_masking, valid_patches, valid_patches_needed
from xsmae.ops import resize
from xsmae.optim import create_optimizer
from xsmae.sharding import by_batch, put_batch
from xsmae.train_state import create_train_state, prepare_views, train_step
from xsmae.trainer import (
    batch_shapes,
    create_trainer,
    crop_size,
    min_valid_patches,
    step_fields,
)
from xsmae.weights.description import describe_encoder, new_network
from xsmae.weights.encoder import Encoder, load_encoder
from xsmae.weights.warm_start import adopt

FIVE = ("blue", "green", "red", "nir", "swir")
GROUPS = (("red", "green", "blue"), ("swir",), ("nir",))
MEAN, STD = (900.0, 1000.0, 1100.0, 2500.0, 1800.0), (300.0, 300, 400, 700, 600)
# Half the time to compile: the steps here run a few times only.
FAST = {"xla_backend_optimization_level": 0}
CASES = {
    "mae": ("published", "mae"),
    "sat_mae": ("published", "sat_mae"),
    "scale_mae": ("published", "scale_mae"),
    "corrected": ("corrected", "cross_scale_mae"),
    "published": ("published", "cross_scale_mae"),
}


def config_of(case):
    """A tiny network of 16 patches a view, for float32 images of five bands."""
    config = common.get_common(CASES[case][0], "tiny", CASES[case][1])
    config.batch_size, config.views.size = 4, 32
    config.bands, config.mean, config.std = FIVE, MEAN, STD
    config.dtype, config.units = "float32", "reflectance x 10000"
    config.model.update(
        patch_size=8, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2, dtype="float32", reference_gsd=1.0,
    )  # fmt: skip
    if case == "sat_mae":
        config.model.update(channel_groups=GROUPS, group_dim=8, decoder_group_dim=8)
    if case == "scale_mae":
        config.model.update(head_dim=8, head_depth=1)
    if "predictor_hidden_dim" in config.model:
        config.model.predictor_hidden_dim = 16
    return config


@functools.cache
def step_of(case, *, accumulation_steps=1):
    """(compiled step, state, network); the optimiser's state is the last gradient."""
    config = config_of(case)
    method = METHODS[config.method]
    optimizer = create_optimizer(
        learning_rate=1.0, num_steps=10, warmup_steps=0,
        weight_decay=0.0, b1=0.9, b2=0.9,
    )  # fmt: skip
    optimizer = dataclasses.replace(optimizer, transform=optax.trace(0.0))
    model = with_group_indices(config.model.to_dict(), FIVE)
    loss = config.loss.to_dict()
    graphdef, state = some_state(
        functools.partial(method.build, model, channels=5, view_size=32), optimizer
    )
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        losses=functools.partial(method.losses, model=model, loss=loss),
        weights={name: term["weight"] for name, term in loss.items()},
        optimizer=optimizer,
        noise_size=48 if case == "sat_mae" else 16,
        bands=Bands.of(config),
        target_scale=method.target_scale(model),
        accumulation_steps=accumulation_steps,
    )
    return jax.jit(step, compiler_options=FAST), state, graphdef


def some_state(build, optimizer):
    """A network and random numbers for it, without compiling how they are drawn."""
    found = {}

    def shapes(key):
        found["graphdef"], state = create_train_state(
            lambda rngs: build(rngs=rngs), optimizer, key
        )
        return dataclasses.replace(state, key=None)

    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.0, 0.1, x.shape), x.dtype),
        jax.eval_shape(shapes, jax.random.key(0)),
    )
    return found["graphdef"], dataclasses.replace(state, key=jax.random.key(0))


def some_valid(views, size, batch=4, seed=0):
    """The top fifth is missing, and one pixel in five of the rest."""
    valid = np.random.default_rng(seed).random((batch, views, size, size)) > 0.2
    valid[:, :, : size // 5 * 2] = False
    return valid


def batch_of(case, *, valid=True, seed=0):
    config = config_of(case)
    views, size = METHODS[config.method].num_views, crop_size(config)
    rng = np.random.default_rng(seed)
    box = np.tile([[0.0, 0, 32, 32], [4, 6, 24, 22]], (4, 1, 1))[:, :views]
    batch = {
        "image": rng.normal(MEAN, STD, (4, views, size, size, 5)).astype(np.float32),
        "gsd": np.full((4, views, 2), 1.5, np.float32),
        "box": box.astype(np.float32),
        "flip": rng.integers(0, 2, (4, 2)).astype(bool),
    }
    return batch | ({"valid": some_valid(views, size)} if valid else {})


def poisoned(batch, value):
    image = batch["image"].copy()
    image[~batch["valid"]] = value
    return batch | {"image": image}


def assert_equal_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def raw(state):
    """The numbers of a state; keys are no arrays of numbers."""
    return state.params, state.batch_stats, state.opt_state


# The whole step


@pytest.mark.parametrize("case", CASES)
def test_invalid_pixels_change_no_bit_of_loss_and_gradient(case):
    step, state, _ = step_of(case)
    batch = batch_of(case)
    after, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    for value in (np.nan, 1e9):
        found, found_metrics = step(state, poisoned(batch, value))
        assert_equal_bits(raw(after), raw(found))
        assert_equal_bits(metrics, found_metrics)
    changed = batch["image"] + 300 * batch["valid"][..., None].astype(np.float32)
    _, changed_metrics = step(state, batch | {"image": changed})
    assert changed_metrics["loss"] != metrics["loss"]


@pytest.mark.parametrize("case", CASES)
def test_all_valid_is_as_without_the_field(case):
    step, state, _ = step_of(case)
    batch = batch_of(case, valid=False)
    after, metrics = step(state, batch)
    whole = batch | {"valid": np.ones(batch["image"].shape[:-1], bool)}
    found, found_metrics = step(state, whole)
    for name, value in metrics.items():
        tolerance = 1e-5 if name == "grad_norm" else 1e-6
        np.testing.assert_allclose(found_metrics[name], value, rtol=tolerance)
    for a, b in zip(
        jax.tree.leaves(after.opt_state), jax.tree.leaves(found.opt_state), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_nothing_valid_is_a_loss_of_0(case):
    """The contrastive term remains: it compares what there is."""
    step, state, _ = step_of(case)
    batch = batch_of(case)
    nothing = poisoned(batch | {"valid": np.zeros_like(batch["valid"])}, np.nan)
    _, metrics = step(state, nothing)
    assert int(metrics["nonfinite"]) == 0
    for name, value in metrics.items():
        if name.startswith("loss/") and name != "loss/contrastive":
            assert value == 0, name


def test_accumulation_carries_valid():
    """Parts with equally many valid patches give the large batch's gradient."""
    batch = batch_of("mae")
    batch["valid"] = np.broadcast_to(batch["valid"][:1], batch["valid"].shape)
    step, state, _ = step_of("mae")
    whole, whole_metrics = step(state, batch)
    parts_step, *_ = step_of("mae", accumulation_steps=2)
    parts, parts_metrics = parts_step(state, poisoned(batch, np.nan))
    np.testing.assert_allclose(parts_metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(whole.opt_state), jax.tree.leaves(parts.opt_state), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_a_trainer_of_float32_images_takes_valid():
    config = config_of("mae")
    trainer = create_trainer(config, num_images=100)
    shapes = batch_shapes(config)
    assert shapes["image"].dtype == np.float32
    assert shapes["image"].shape == (4, 1, 32, 32, 5)
    assert shapes["valid"].dtype == bool
    assert shapes["valid"].shape == (4, 1, 32, 32)
    batch = poisoned(batch_of("mae"), np.nan) | {"index": np.arange(4)}
    assert set(step_fields(batch)) == set(shapes)
    arrays = put_batch(step_fields(batch), by_batch(trainer.mesh))
    state, metrics = trainer.step(trainer.initial_state(), arrays)
    assert np.isfinite(metrics["loss"])
    pictures = trainer.predict(state, arrays)
    assert np.isfinite(pictures.panels[0]).all()


def test_batches_of_todays_sources_have_no_valid():
    config = common.get_common("corrected", "tiny")
    assert set(batch_shapes(config)) == {"image", "gsd", "box", "flip"}
    assert batch_shapes(config)["image"].dtype == np.uint8


# Views


def test_invalid_pixels_become_0():
    batch = poisoned(batch_of("mae"), np.nan)
    views = prepare_views(batch, bands=Bands.of(config_of("mae")))
    np.testing.assert_array_equal(views.valid, batch["valid"])
    np.testing.assert_array_equal(np.asarray(views.images)[~batch["valid"]], 0)
    expected = (batch["image"] - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(
        np.asarray(views.images)[batch["valid"]], expected[batch["valid"]], atol=1e-5
    )


def test_batches_of_another_dtype_are_refused():
    batch = batch_of("mae") | {"image": np.zeros((4, 1, 32, 32, 5), np.uint8)}
    with pytest.raises(ValueError, match=r"uint8 .*float32"):
        prepare_views(batch, bands=Bands.of(config_of("mae")))


def test_an_averaged_pixel_is_the_mean_of_its_valid_ones():
    config = config_of("scale_mae")
    batch = poisoned(batch_of("scale_mae"), np.nan)
    views = prepare_views(batch, bands=Bands.of(config), target_scale=2)
    np.testing.assert_array_equal(views.target_valid, batch["valid"])
    squares = "b v (h p) (w q) ... -> b v h w (p q) ..."
    valid = rearrange(batch["valid"], squares, p=2, q=2)
    target = rearrange(np.asarray(views.target), squares, p=2, q=2)
    count = valid.sum(-1)
    assert set(np.unique(count)) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(views.valid, count >= 2)
    mean = (target * valid[..., None]).sum(-2) / np.maximum(count, 1)[..., None]
    mean[count < 2] = 0
    np.testing.assert_allclose(views.images, mean, atol=1e-5)


def test_a_half_is_a_half_at_any_scale():
    valid = jnp.zeros((1, 12, 12), bool).at[:, :3].set(True).at[:, 6:8].set(True)
    images = jnp.where(valid[..., None], 2.0, 0.0)
    means, found = resize.area_of_valid(images, valid, (2, 2))
    np.testing.assert_array_equal(found, [[[True, True], [False, False]]])
    np.testing.assert_allclose(means[0, :, :, 0], [[2, 2], [0, 0]], rtol=1e-6)


# Masks


@pytest.mark.parametrize(("groups", "spatial"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.9])
def test_no_invalid_patch_is_kept(groups, spatial, mask_ratio):
    """With just enough valid patches, whichever they are."""
    model = MODEL | {"mask_ratio": mask_ratio}
    if groups:
        model |= {
            "channel_groups": ((0,), (2,), (1,)), "group_dim": 8,
            "decoder_group_dim": 4, "spatial_mask": spatial, "band_order": "grouped",
        }  # fmt: skip
    method = METHODS["sat_mae" if groups else "mae"]
    network = nnx.eval_shape(
        lambda: method.build(model, channels=3, view_size=16, rngs=nnx.Rngs(0))
    )
    tokens = network.noise_size(16, 16)
    needed = valid_patches_needed(16, mask_ratio, groups=tokens // 16)
    rng = np.random.default_rng(0)
    valid = rng.permuted(np.arange(16) < needed + np.zeros((50, 1)), axis=1)
    noise = rng.random((50, tokens)).astype(np.float32)
    masking = network.random_masking(jnp.asarray(noise), jnp.asarray(valid))
    kept = np.asarray(masking.ids_keep) % 16
    assert kept.shape[1] > 0
    assert np.take_along_axis(valid, kept, axis=1).all()
    mask = np.asarray(masking.mask).reshape(50, -1, 16)
    assert not (mask * ~valid[:, None]).any()
    plain = network.random_masking(jnp.asarray(noise), jnp.ones((50, 16), bool))
    assert_equal_bits(plain, network.random_masking(jnp.asarray(noise)))
    # One less, and there is a token too many for the valid patches.
    fewer = rng.permuted(np.arange(16) < needed - 1 + np.zeros((50, 1)), axis=1)
    masking = network.random_masking(jnp.asarray(noise), jnp.asarray(fewer))
    kept = np.asarray(masking.ids_keep) % 16
    assert not np.take_along_axis(fewer, kept, axis=1).all()


def test_the_valid_patches_that_a_config_needs():
    assert min_valid_patches(config_of("mae")) == 4
    config = config_of("sat_mae")
    config.model.mask_ratio = 0.9  # 4 of 48 tokens, and 1 of 16
    assert min_valid_patches(config) == 2
    config.model.spatial_mask = True
    assert min_valid_patches(config) == 1


def test_half_of_a_patch_is_enough():
    valid = np.zeros((1, 8, 8), bool)
    valid[0, :2, :4] = True  # 8 of 16 pixels
    valid[0, 4:6, 4:] = True
    valid[0, 4, 4] = False  # 7 of 16 pixels
    np.testing.assert_array_equal(
        valid_patches(jnp.asarray(valid), 4), [[True, False, False, False]]
    )


def test_masks_without_valid_patches_hide_as_before():
    noise = jax.random.uniform(jax.random.key(0), (3, 16))
    masking = random_masking(noise, 0.75, jnp.zeros((3, 16), bool))
    assert not np.asarray(masking.mask).any()
    np.testing.assert_array_equal(
        masking.ids_keep, random_masking(noise, 0.75).ids_keep
    )


# Losses


def statistics_by_hand(values):
    """Mean and standard deviation of one patch's valid values."""
    var = values.var(ddof=1) if len(values) > 1 else 0.0
    return values.mean(), np.sqrt(var + 1e-6)


@pytest.mark.parametrize("groups", [(), ((0, 2), (1,))])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_by_hand(norm_pix_loss, groups):
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 3, 2, 6, 4 * 3)).astype(np.float32)
    valid = rng.random((3, 2, 6, 4)) > 0.4
    valid[0, 0, 0] = [True, False, False, True]
    patches = valid.sum(-1) >= 2
    shape = (3, 2, len(groups), 6) if groups else (3, 2, 6)
    mask = rng.integers(0, 2, shape).astype(np.float32)
    mask = mask * (patches[:, :, None] if groups else patches)
    target[~valid.repeat(3, axis=-1)] = 0
    found = losses.reconstruction(
        jnp.asarray(pred), jnp.asarray(target), jnp.asarray(mask),
        norm_pix_loss=norm_pix_loss, channel_groups=groups, channels=3,
        valid=jnp.asarray(valid),
    )  # fmt: skip
    for view in range(2):
        errors = []
        for sample, patch in np.ndindex(3, 6):
            seen = valid[sample, view, patch]
            p, t = (x[sample, view, patch].reshape(4, 3)[seen] for x in (pred, target))
            if norm_pix_loss and seen.any():
                mean, std = statistics_by_hand(t.reshape(-1))
                t = (t - mean) / std
            for group, bands in enumerate(groups or ((0, 1, 2),)):
                at = (sample, view, group, patch) if groups else (sample, view, patch)
                if mask[at]:
                    errors.append(((p - t)[:, list(bands)] ** 2).mean())
        np.testing.assert_allclose(found[view], np.mean(errors), rtol=1e-5)


def test_statistics_of_few_values_are_finite():
    target = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    valid = jnp.asarray([[[True] * 4, [True] + [False] * 3, [False] * 4]])
    target = jnp.where(valid, target, 0)
    mean, std = losses.patch_statistics(target, valid=valid)
    plain_mean, plain_std = losses.patch_statistics(target)
    np.testing.assert_allclose(mean[0, 0], plain_mean[0, 0], rtol=1e-6)
    np.testing.assert_allclose(std[0, 0], plain_std[0, 0], rtol=1e-6)
    np.testing.assert_allclose(mean[0, 1, 0], target[0, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(std[0, 1:, 0], 1e-3, rtol=1e-5)


def sampled_by_hand(target, seen, box, grid):
    """What view 1 holds at each patch of a box; None where it does not all count."""
    rows, columns = grid
    top, left, bottom, right = box
    for row, column in np.ndindex(rows, columns):
        y = top + (bottom - top) * (row + 0.5) / rows
        x = left + (right - left) * (column + 0.5) / columns
        if not (0 <= y <= 1 and 0 <= x <= 1):
            yield None
            continue
        y, x = (
            np.clip(y * rows - 0.5, 0, rows - 1),
            np.clip(x * columns - 0.5, 0, columns - 1),
        )
        total, whole = 0.0, True
        for i, j in np.ndindex(rows, columns):
            weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
            total = total + weight * target[i * columns + j]
            whole &= weight == 0 or bool(seen[i * columns + j])
        yield total if whole else None


@pytest.mark.parametrize("aligned", [False, True])
def test_cross_prediction_by_hand(aligned):
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 3, 6, 5)).astype(np.float32)
    valid = rng.random((3, 2, 6)) > 0.2
    boxes = np.float32([[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.5, 0.5, 1.2, 1.1]])
    found = losses.cross_prediction(
        jnp.asarray(predicted), jnp.asarray(target), stop_gradient=True,
        box=jnp.asarray(boxes) if aligned else None, grid=(2, 3),
        valid=jnp.asarray(valid),
    )  # fmt: skip
    errors = []
    for sample in range(3):
        first, second = valid[sample]
        expected = [t if ok else None for t, ok in zip(target[sample], first)]  # noqa: B905
        if aligned:
            expected = sampled_by_hand(target[sample], first, boxes[sample], (2, 3))
        for patch, value in enumerate(expected):
            if value is not None and second[patch]:
                errors.append(((predicted[sample, patch] - value) ** 2).mean())
    assert 3 <= len(errors) < 18
    np.testing.assert_allclose(found, np.mean(errors), rtol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_frequency_band_by_hand(absolute):
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 2, 1, 8, 8, 3)).astype(np.float32)
    mask = np.float32([[[1, 0, 1, 1]], [[0, 1, 1, 0]]])
    valid = rng.random((2, 1, 8, 8)) > 0.3
    found = losses.frequency_band(
        jnp.asarray(pred), jnp.asarray(target), jnp.asarray(mask),
        absolute=absolute, grid=(2, 2), valid=jnp.asarray(valid),
    )  # fmt: skip
    error = np.abs(pred - target) if absolute else (pred - target) ** 2
    pixels = mask.reshape(2, 1, 2, 2).repeat(4, axis=2).repeat(4, axis=3) * valid
    expected = (error.sum(-1) * pixels).sum() / pixels.sum()
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("through", [0, 8])
def test_frequencies_of_a_constant_image_ignore_what_is_missing(through):
    """A zero that were averaged in would show as a high frequency at the border."""
    config = config_of("scale_mae")
    batch = batch_of("scale_mae")
    batch["image"] = np.float32(MEAN) + 2 * np.ones_like(batch["image"]) * STD
    batch["image"] = batch["image"].astype(np.float32)
    views = prepare_views(batch, bands=Bands.of(config), target_scale=2)
    loss = {
        "low_frequency": {"through": through},
        "high_frequency": {"absolute": True, "cutoff": 1 / 8},
    }
    target = frequencies_of(views, loss)
    np.testing.assert_allclose(target.high, 0, atol=1e-5)
    low, valid = np.asarray(target.low), np.asarray(target.low_valid)
    np.testing.assert_allclose(low[valid], 2, rtol=1e-5)
    np.testing.assert_array_equal(low[~valid], 0)
    assert 0 < valid.mean() < 1


# Pictures


@pytest.mark.parametrize("case", ["mae", "sat_mae", "scale_mae"])
def test_pictures_hide_what_is_not_valid(case):
    config = config_of(case)
    method = METHODS[config.method]
    model = with_group_indices(config.model.to_dict(), FIVE)
    scale = method.target_scale(model)
    batch = poisoned(batch_of(case), np.nan)
    views = prepare_views(batch, bands=Bands.of(config), target_scale=scale)
    numbers = 48 if case == "sat_mae" else 16
    noise = jax.random.uniform(jax.random.key(0), (4, 1, numbers))
    _, state, graphdef = step_of(case)
    forward = jax.jit(
        lambda params: nnx.merge(graphdef, params)(views, noise), compiler_options=FAST
    )
    output = forward(state.params)
    pictures = method.pictures(output, views, model=model, loss=config.loss.to_dict())
    hidden, valid = np.asarray(pictures.hidden), np.asarray(views.valid)
    assert hidden[~valid].all()
    assert hidden[:, :, :8].all()  # patches without half of their pixels
    assert not hidden.all()
    for panel in pictures.panels:
        known = valid
        if panel.shape[2] == 64:
            known = np.asarray(views.target_valid)
        assert np.isfinite(panel).all()
        np.testing.assert_array_equal(np.asarray(panel)[~known], 0)
        assert np.asarray(panel)[known].any()


# Bands, groups of bands, and what travels with the weights


def test_bands_of_float32_images():
    config = config_of("mae")
    bands = Bands.of(config)
    assert (bands.dtype, bands.units) == ("float32", "reflectance x 10000")
    images = np.float32([MEAN, np.add(MEAN, STD)])
    np.testing.assert_allclose(bands.normalize(images), [[0] * 5, [1] * 5], atol=1e-6)
    np.testing.assert_array_equal(bands.rescale(images), images)
    again = bands.denormalize(bands.normalize(images))
    np.testing.assert_allclose(again, images, rtol=1e-6)


def test_bands_without_the_new_fields_are_uint8():
    fields = {"bands": list(BANDS), "mean": [0.4] * 3, "std": [0.2] * 3}
    bands = Bands.of(fields)
    assert (bands.dtype, bands.units) == ("uint8", UNITS)
    assert "255" not in Bands.of(fields | {"dtype": "float32"}).units
    with pytest.raises(UserError, match=r"dtype='int64'"):
        Bands.of(fields | {"dtype": "int64"})


def test_mean_and_std_of_float32_images_may_be_any_numbers():
    config = config_of("mae")
    check_ranges(config, 1, of_method={})
    for name, value in (("std", (0.0,) * 5), ("mean", (np.inf,) * 5)):
        changed = config_of("mae")
        changed[name] = value
        with pytest.raises(UserError, match=name):
            check_ranges(changed, 1, of_method={})
    config.dtype = "uint8"
    with pytest.raises(UserError, match="mean"):
        check_ranges(config, 1, of_method={})


def description(case, **changes):
    config = config_of(case)
    bands = dataclasses.replace(Bands.of(config), **changes)
    return describe_encoder(config.model, image_size=32, bands=bands, run={})


def test_encoder_json_carries_what_the_values_are(tmp_path):
    info = description("mae")
    assert info["dtype"] == "float32"
    assert info["units"] == "reflectance x 10000"
    assert "scale" not in info
    Encoder(new_network(info), info).save(tmp_path)
    assert Bands.of(json.loads((tmp_path / "encoder.json").read_text())) == Bands.of(
        config_of("mae")
    )


def test_an_encoder_of_float32_images_reads_them_as_they_are():
    info = description("mae")
    encoder = Encoder(new_network(info), info)
    images = batch_of("mae")["image"][:, 0]
    normalised = (images - np.float32(MEAN)) / np.float32(STD)
    expected = new_network(info)(jnp.asarray(normalised)).astype(jnp.float32)
    np.testing.assert_allclose(encoder.tokens(images), expected, atol=1e-4)
    for wrong in (images.astype(np.uint8), np.where(images > 2000, np.nan, images)):
        with pytest.raises(UserError, match=f"{wrong.dtype}.*reflectance x 10000"):
            encoder.tokens(wrong)


def test_an_older_encoder_json_is_the_same_encoder():
    info = description("mae", dtype="uint8")
    network = new_network(info)
    expected = Encoder(network, info).digest
    older = {k: v for k, v in info.items() if k != "dtype"}
    for other in (older, {**info, "scale": 255.0}):
        assert Encoder(network, other).digest == expected
    rasters = {**description("mae"), "scale": 1e4}  # had no effect
    images = batch_of("mae")["image"][:, 0]
    found, same = (Encoder(network, i) for i in (rasters, description("mae")))
    assert found.digest == same.digest
    np.testing.assert_array_equal(found.tokens(images), same.tokens(images))
    other = Encoder(network, description("mae"))
    assert other.digest != Encoder(network, info).digest


def test_another_scale_of_8_bit_images_is_refused(tmp_path):
    info = description("mae", dtype="uint8")
    Encoder(new_network(info), {**info, "scale": 1000.0}).save(tmp_path)
    with pytest.raises(UserError, match=r"scale=1000.0.*255.*8-bit"):
        load_encoder(tmp_path)


def test_groups_may_be_named():
    info = description("sat_mae")
    assert info["architecture"]["channel_groups"] == [[2, 1, 0], [4], [3]]
    config = config_of("sat_mae")
    named = create_trainer(config, num_images=100).graphdef
    config.model.channel_groups = ((2, 1, 0), (4,), (3,))
    assert create_trainer(config, num_images=100).graphdef == named
    config.model.channel_groups = (("red", "green", "blue"), ("nir", "thermal"))
    with pytest.raises(UserError, match=r"'thermal'.*blue, green, red, nir, swir"):
        create_trainer(config, num_images=100)
    config.model.channel_groups = (("red", "green"), ("nir", "swir"))
    with pytest.raises(UserError, match="exactly one group"):
        create_trainer(config, num_images=100)


def test_weights_of_another_dtype_start_no_run(tmp_path):
    saved = config_of("mae").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = common.get_common("published", "tiny", "mae")
    config.init = str(tmp_path)
    with pytest.raises(UserError, match=r"float32 .*uint8"):
        adopt(config, ())
