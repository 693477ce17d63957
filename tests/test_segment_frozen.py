"""Frozen features of patches and pixels, the linear layer on them, and retrieval."""

import numpy as np
import pytest
from flax import nnx

from tests.support.encoders import tiny_encoder
from tests.support.segmentation import Labelled, ramp, some_scenes
from xsmae.bands import Bands
from xsmae.data.mask_classes import IGNORE
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.segmentation import dense
from xsmae.evaluation.segmentation.cache import cached_windows
from xsmae.evaluation.segmentation.scores import scores
from xsmae.evaluation.tasks.segment import confusions
from xsmae.evaluation.tasks.segment_frozen import (
    class_histograms,
    fit_linear,
    retrieval,
)


def plain(images):
    return images.astype(np.float32)


def test_statistics_of_a_neighbourhood():
    rng = np.random.default_rng(0)
    images = rng.normal(100, 2, (2, 7, 6, 2)).astype(np.float32)
    found = np.asarray(dense.neighbourhood_statistics(3)(images, None))
    assert found.shape == (2, 7, 6, 8)
    for y, x in ((0, 0), (3, 2), (6, 5), (2, 0)):
        near = images[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].reshape(2, -1, 2)
        parts = [near.mean(1), near.std(1), near.min(1), near.max(1)]
        expected = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(found[:, y, x], expected, rtol=1e-4, atol=1e-4)


def test_last_tokens_are_the_encoders_on_a_grid():
    encoder = tiny_encoder(depth=1)
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    gsd = np.ones((2, 2), np.float32)
    found = dense.last_tokens(encoder)(images, gsd)
    assert found.shape == (2, 2, 3, 16)
    expected = nnx.jit(encoder.network)(images, gsd=gsd)[:, 1:]
    np.testing.assert_allclose(found.reshape(2, 6, 16), expected, rtol=1e-4, atol=1e-5)


def test_windows_cover_every_pixel_of_all_images():
    source = [ramp(10, 19, gsd=(2.0, 1.0)), ramp(5, 8)]
    told = []

    def same(images, gsd):
        assert images.shape == (4, 8, 8, 2)
        told.append(gsd)
        return images

    features, masks = dense.window_features(
        same, source, normalize=plain, crop=8, batch_size=4
    )
    assert features.dtype == np.float16
    assert features.shape == (2 * 3 + 1, 8, 8, 2)
    counted = masks != IGNORE
    np.testing.assert_array_equal(features[counted][:, 1] % 7, masks[counted])
    places = {tuple(place) for place in features[:6].reshape(-1, 2).astype(int)}
    assert places == {(y, x) for y in range(10) for x in range(19)}
    assert not counted[6, 5:].any()
    np.testing.assert_array_equal(features[6, 5:], features[6, [4] * 3])
    np.testing.assert_array_equal(np.concatenate(told)[:7, 0], [2] * 6 + [1])
    with pytest.raises(UserError, match="float16"):
        dense.window_features(
            lambda images, gsd: images + 1e6,
            source,
            normalize=plain,
            crop=8,
            batch_size=4,
        )


def test_windows_on_disk_resume_and_equal_those_in_memory(tmp_path):
    # 6, 1, 1, 4 and 1 windows: with batches of two, the groups are 0, 1 to 2, 3, 4.
    sizes = ((10, 19), (5, 8), (8, 8), (16, 9), (3, 3))
    source, computed, said = [ramp(*size) for size in sizes], [], []

    def dense_of(images, gsd):
        if len(computed) == stop_after:
            raise KeyboardInterrupt
        computed.append(images)
        return images[:, ::4, ::4] + 1 / 3

    options = {"normalize": plain, "crop": 8}
    stop_after = None
    expected = dense.window_features(dense_of, source, **options, batch_size=2)
    assert len(computed) == 7
    folder = tmp_path / "cache"

    def windows(batch_size=2):
        computed.clear()
        said.clear()
        return cached_windows(
            dense_of, source, folder, **options, batch_size=batch_size, title="some",
            say=said.append,
        )  # fmt: skip

    stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        windows()
    assert len(list(folder.iterdir())) == 2  # three batches of image 0, one of 1 and 2
    stop_after = None
    for batch_size, calls in ((2, 3), (2, 0), (5, 0)):
        for found, whole in zip(windows(batch_size), expected, strict=True):
            assert (found.shape, found.dtype, len(found)) == (
                whole.shape, whole.dtype, len(whole),
            )  # fmt: skip
            rows = np.array([12, 0, 7, 7])
            np.testing.assert_array_equal(found[rows], whole[rows])
            np.testing.assert_array_equal(found[np.arange(13)], whole)
        assert len(computed) == calls
    assert said == ["some: 5/5 (cached)"]
    # A damaged file is computed again; its windows stand where they were.
    damaged = folder / "000000001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-40] ^= 1
    damaged.write_bytes(content)
    features, _ = windows(5)
    assert len(computed) == 1
    assert f"{damaged} is damaged" in said[0]
    np.testing.assert_array_equal(features[np.arange(13)], expected[0])


def test_heads_give_the_same_from_disk_and_memory(tmp_path):
    source = some_scenes(np.random.default_rng(0))
    statistics = dense.neighbourhood_statistics(3)
    options = {"normalize": plain, "crop": 8, "batch_size": 4}
    in_memory = dense.window_features(statistics, source, **options)
    on_disk = cached_windows(
        statistics, source, tmp_path, **options, title="", say=lambda line: None
    )
    images = np.stack([s.image[:8, :8] for s in source]).astype(np.float32)
    gsd = np.ones((4, 2), np.float32)
    recipe = recipes.linear_segmentation()
    recipe.update(batch_size=4, num_steps=5, crop=8)
    plan = recipes.create_plan_of_steps(recipe)
    for head in (
        lambda found: retrieval(
            statistics, *found, 3, seed=0, k=5, temperature=0.02, memory=700
        ),
        lambda found: fit_linear(statistics, *found, 3, plan, recipe=recipe, seed=0),
    ):
        first, second = (head(found)(images, gsd) for found in (in_memory, on_disk))
        np.testing.assert_array_equal(first, second)


def test_pixels_without_a_value_are_zero():
    image = np.full((4, 4, 2), np.nan, np.float32)
    image[0] = 3
    labelled = Labelled(image, np.zeros((4, 4), np.uint8), valid=image[..., 0] == 3)
    found = dense.normalized(labelled, plain)
    assert (found[0] == 3).all()
    assert (found[1:] == 0).all()


def test_histograms_of_patches():
    masks = np.array([[[0, 1, 2, 2], [1, 1, 2, IGNORE], *[[IGNORE] * 4] * 2]], np.uint8)
    found = class_histograms(masks, (2, 2), 3)
    np.testing.assert_allclose(found[0, 0], [[0.25, 0.75, 0], [0, 0, 1]])
    assert not found[0, 1].any()


def miou(predict, source, normalize, recipe):
    matrices = confusions(
        predict, source, normalize=normalize, recipe=recipe, num_classes=3
    )
    return scores(matrices).miou


def test_a_linear_layer_on_statistics_learns_colours():
    source = some_scenes(np.random.default_rng(0))
    recipe = recipes.linear_segmentation()
    recipe.update(batch_size=4, num_steps=150, crop=16, overlap=8, learning_rate=0.05)
    statistics, losses = dense.neighbourhood_statistics(3), []

    def normalize(images):
        return images.astype(np.float32) / 255

    found = dense.window_features(
        statistics, source, normalize=normalize, crop=16, batch_size=4
    )
    predict = fit_linear(
        statistics,
        *found,
        3,
        recipes.create_plan_of_steps(recipe),
        recipe=recipe,
        seed=0,
        each_step=lambda step, loss: losses.append(float(loss)),
    )
    assert losses[0] == pytest.approx(np.log(3), abs=0.05)
    assert np.mean(losses[-5:]) < 0.3
    assert miou(predict, source, normalize, recipe) > 0.85


def test_retrieval_finds_colours_in_the_tokens():
    encoder = tiny_encoder(depth=1)
    normalize = Bands.of(encoder.info).normalize
    train, test = (some_scenes(np.random.default_rng(seed)) for seed in (0, 1))
    recipe = recipes.linear_segmentation()
    recipe.update(batch_size=4, crop=8, overlap=0)
    numbers = {"k": 5, "temperature": 0.02, "memory": 1000}
    tokens = dense.last_tokens(encoder)
    features, masks = dense.window_features(
        tokens, train, normalize=normalize, crop=8, batch_size=4
    )
    predict = retrieval(tokens, features, masks, 3, seed=0, **numbers)
    assert miou(predict, test, normalize, recipe) > 0.8
    # One patch of one class in memory: every pixel is of that class.
    only = np.full_like(masks, IGNORE)
    only[3, :4, :4] = 2
    predict = retrieval(tokens, features, only, 3, seed=0, **numbers)
    gsd = np.ones((2, 2), np.float32)
    shares = predict(np.zeros((2, 8, 8, 3), np.float32), gsd)
    np.testing.assert_allclose(shares, np.broadcast_to([0, 0, 1.0], (2, 8, 8, 3)))
    few = [
        np.asarray(
            retrieval(tokens, features, masks, 3, seed=seed, **numbers | {"memory": 1})(
                np.zeros((2, 8, 8, 3), np.float32), gsd
            )
        )
        for seed in range(8)
    ]
    assert len({tuple(x[0, 0, 0]) for x in few}) > 1
