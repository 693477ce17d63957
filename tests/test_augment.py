"""Erasing, mixup, cutmix and drop path: areas, shares, expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from xsmae.evaluation.fitting.augment import cutmix_rectangle, mix, random_erasing
from xsmae.models.drop_path import drop_path_scales
from xsmae.models.vit import run_blocks, stacked_blocks

KEY = jax.random.key(0)
jitted_mix = jax.jit(mix, static_argnames=("mixup", "cutmix", "switch"))


def constant_images(batch=8, size=16):
    """All pixels of image i are i, so a pixel shows its image."""
    values = jnp.arange(batch, dtype=jnp.float32)
    return jnp.broadcast_to(values[:, None, None, None], (batch, size, size, 3))


def mixed(number, **options):
    images = constant_images()
    targets = jnp.eye(8)
    options = {"mixup": 0.0, "cutmix": 0.0, "switch": 0.5, **options}
    return jitted_mix(jax.random.fold_in(KEY, number), images, targets, **options)


def test_nothing_is_mixed_where_both_are_off():
    images, targets = mixed(0)
    np.testing.assert_array_equal(images, constant_images())
    np.testing.assert_array_equal(targets, jnp.eye(8))


def test_mixup_adds_images_as_it_adds_labels():
    shares = []
    for number in range(60):
        images, targets = mixed(number, mixup=0.8)
        share = targets[0, 0]
        expected = share * np.arange(8) + (1 - share) * np.arange(8)[::-1]
        np.testing.assert_allclose(images[:, 3, 5, 1], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jnp.ptp(images, axis=(1, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
        shares.append(float(share))
    assert min(shares) >= 0
    assert max(shares) <= 1
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.15)
    assert np.var(shares) == pytest.approx(1 / 10.4, abs=0.04)


def test_cutmix_labels_are_pixel_areas():
    shares = []
    for number in range(60):
        images, targets = mixed(number, cutmix=1.0)
        for row in (0, 3):
            own = np.asarray(images[row, :, :, 0] == row)
            assert own.mean() == pytest.approx(float(targets[row, row]), abs=1e-6)
            # The rest is a rectangle of the other image.
            assert (images[row, :, :, 0][~own] == 7 - row).all()
            tall, wide = (~own).any(1).sum(), (~own).any(0).sum()
            assert tall * wide == (~own).sum()
        shares.append(float(targets[0, 0]))
    assert 0 <= min(shares) < 0.3
    assert 0.8 < max(shares) <= 1


def test_a_rectangle_inside_has_the_area_drawn():
    found = [
        float(cutmix_rectangle(jax.random.fold_in(KEY, n), 0.75, 64, 64).mean())
        for n in range(40)
    ]
    assert max(found) == pytest.approx(0.25)
    assert min(found) < 0.25  # clipped at an edge


def test_either_is_taken_as_often_as_the_switch_says():
    cut = [
        len(np.unique(mixed(number, mixup=0.8, cutmix=1.0, switch=0.3)[0][0])) == 2
        for number in range(120)
    ]
    # An empty or full rectangle looks like mixup here: a few percent.
    assert np.mean(cut) == pytest.approx(0.28, abs=0.13)
    assert not any(
        len(np.unique(mixed(n, mixup=0.8, cutmix=1.0, switch=0.0)[0][0])) == 2
        for n in range(9)
    )


def test_erased_areas():
    images = jnp.full((2000, 16, 16, 3), 100.0)
    found = np.asarray(random_erasing(KEY, images, probability=0.25))
    erased = (found != 100).any(-1)
    share = erased.mean((1, 2))
    hit = share > 0
    assert hit.mean() == pytest.approx(0.25, abs=0.035)
    # Uniform from 0.02 to 1/3, rounded to pixels.
    assert share[hit].min() >= 0.01
    assert share[hit].max() < 0.37
    assert share[hit].mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    tall, wide = erased.any(2).sum(1)[hit], erased.any(1).sum(1)[hit]
    np.testing.assert_array_equal(tall * wide, erased.sum((1, 2))[hit])
    assert (tall / wide).max() > 2
    assert (tall / wide).min() < 0.5
    noise = found[erased]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(
        random_erasing(KEY, images[:2], probability=0.0), images[:2]
    )
    assert (
        (random_erasing(KEY, images[:9], probability=1.0) != 100).any((1, 2, 3)).all()
    )


def test_smoothed_labels_are_the_formulas():
    """Szegedy et al. 2016: 1 - s for the label, s spread over all classes."""
    found = optax.smooth_labels(jnp.eye(5)[jnp.array([1, 4])], 0.1)
    expected = np.full((2, 5), 0.02)
    expected[0, 1] = expected[1, 4] = 0.92
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_drop_path_rises_linearly_and_keeps_the_expectation():
    scales = drop_path_scales(KEY, rate=0.4, depth=5, batch=20_000)
    assert scales.shape == (5, 2, 20_000)
    dropped = (scales == 0).mean(axis=2)
    expected = np.array([0, 0.1, 0.2, 0.3, 0.4])[:, None].repeat(2, axis=1)
    np.testing.assert_allclose(dropped, expected, atol=0.015)
    np.testing.assert_allclose(scales.mean(axis=2), 1, atol=0.02)
    kept = scales[2][scales[2] > 0]
    np.testing.assert_allclose(kept, 1 / 0.8, rtol=1e-6)
    # Samples and the two residual branches are independent.
    assert abs(np.corrcoef(scales[4])[0, 1]) < 0.03


@pytest.mark.parametrize("norm_style", ["pre", "post"])
@pytest.mark.parametrize("scan", [True, False])
def test_dropped_residuals_leave_the_sample_alone(norm_style, scan):
    blocks = stacked_blocks(3, 8, 2, norm_style=norm_style, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (4, 5, 8))
    plain = run_blocks(blocks, x, scan=scan)
    ones = drop_path_scales(KEY, rate=0.0, depth=3, batch=4)
    np.testing.assert_array_equal(
        run_blocks(blocks, x, branch_scales=ones, scan=scan), plain
    )
    scales = jnp.ones((3, 2, 4)).at[:, :, 1].set(0)
    found = run_blocks(blocks, x, branch_scales=scales, scan=scan)
    np.testing.assert_array_equal(
        found[jnp.array([0, 2, 3])], plain[jnp.array([0, 2, 3])]
    )
    if norm_style == "pre":
        np.testing.assert_array_equal(found[1], x[1])
    assert (found[1] != plain[1]).any()
