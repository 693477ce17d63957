"""Bands: normalisation of stored values and of fractions, and its inverse."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xsmae.bands import BANDS, Bands

OURS = Bands(BANDS, (0.4, 0.5, 0.3), (0.2, 0.1, 0.25))
STORED = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)


def by_hand(images):
    return (images - np.array(OURS.mean)) / np.array(OURS.std)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_stored_values_and_fractions_agree(of):
    expected = by_hand(STORED / 255)
    for images in (STORED, OURS.rescale(STORED), (STORED / 255).astype(np.float16)):
        tolerance = 5e-3 if images.dtype == np.float16 else 1e-5
        found = OURS.normalize(of(images))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)
    assert isinstance(OURS.normalize(of(STORED)), type(of(STORED)))


def test_zeros_and_ones_that_are_stored_are_not_fractions():
    stored = np.array([[0, 1, 255]], np.uint8)
    np.testing.assert_allclose(
        OURS.normalize(stored), by_hand(np.array([[0, 1 / 255, 1]])), rtol=1e-5
    )
    fractions = np.array([[0, 1, 1]], np.float32)
    np.testing.assert_allclose(OURS.normalize(fractions), by_hand(fractions), rtol=1e-5)


def test_what_training_computes_to_the_bit():
    """All earlier runs used this formula; other rounding would change their results."""
    mean, std = (
        255 * jnp.array(x, jnp.float32).reshape(1, 1, 1, -1)
        for x in (OURS.mean, OURS.std)
    )
    expected = jax.jit(lambda x: (x.astype(jnp.float32) - mean) / std)(STORED)
    np.testing.assert_array_equal(jax.jit(OURS.normalize)(jnp.array(STORED)), expected)


def test_denormalised_is_what_was_normalised():
    found = OURS.denormalize(OURS.normalize(STORED))
    np.testing.assert_allclose(found, STORED / 255, atol=1e-6)


def test_of_a_mapping():
    fields = {"bands": list(BANDS), "mean": [0.4, 0.5, 0.3], "std": [0.2, 0.1, 0.25]}
    assert Bands.of(fields) == OURS


def test_images_of_some_bands_are_completed_with_the_means():
    more = Bands(("swir", "blue", "red"), (0.6, 0.3, 0.1), (0.1, 0.2, 0.3))
    images = STORED[..., :2]
    found = more.complete(images, ("red", "blue"))
    np.testing.assert_allclose(found[..., 0], 0.6, rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], images[..., 1] / 255, rtol=1e-6)
    np.testing.assert_allclose(found[..., 2], images[..., 0] / 255, rtol=1e-6)
    normal = more.normalize(found)
    np.testing.assert_allclose(normal[..., 0], 0, atol=1e-6)
    with pytest.raises(ValueError, match="green"):
        more.complete(images, ("red", "green"))


def test_bands_of_rasters_are_found_by_either_name():
    rasters = Bands(("red", "B08", "B02"), (0, 0, 0), (1, 1, 1), "x", "float32", 1)
    assert rasters.find(("B02", "B04", "B08")) == [1, 2, 0]
    assert rasters.find(("blue", "red", "B04")) == [1, None, 0]
    assert OURS.find(("B04", "B03", "blue")) == [None, None, 2]
    # Near infrared in the files of Landsat 5 and 7.
    assert rasters.find(("B4", "B3", "B2")) == [None] * 3


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_pixels_without_a_value_are_0_once_normalised(of):
    images = np.float32(STORED / 255)
    lacking = images.copy()
    lacking[0, 1:3, 2] = np.nan
    found = np.asarray(OURS.normalize(OURS.fill(of(lacking))))
    assert not found[0, 1:3, 2].any()
    expected = np.where(np.isnan(lacking), 0, OURS.normalize(images))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sources_read_bands_without_jax():
    """Reader processes must start quickly, so they must not import JAX."""
    code = "import sys, xsmae.bands, xsmae.data.folder; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
