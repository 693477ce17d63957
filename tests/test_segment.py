"""Crops of images with masks, and the training of UperNet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.support.devices import run_on_devices
from tests.support.encoders import tiny_encoder
from tests.support.segmentation import Labelled, ramp, some_scenes
from xsmae.data.mask_classes import IGNORE
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.segmentation.crops import (
    CropSampler,
    crops_of_steps,
    largest_share,
)
from xsmae.evaluation.segmentation.scores import scores
from xsmae.evaluation.tasks import segment


def sampler(**changes):
    plain = {
        "size": 16, "scale": (1.0, 1.0), "max_share": 1.0, "horizontal_flip": 0.0,
        "vertical_flip": 0.0, "quarter_turns": 0.0,
        "normalize": lambda x: x.astype(np.float32),
    }  # fmt: skip
    return CropSampler(**{**plain, **changes})


def crops(labelled, number=40, **changes):
    draw = sampler(**changes)
    return [draw(labelled, np.random.default_rng(i)) for i in range(number)]


def test_the_gsd_of_a_crop_is_the_ground_between_its_pixels():
    factors = []
    for crop in crops(ramp(90, 70, gsd=(2.0, 0.5)), scale=(0.5, 2.0)):
        inner = crop.image[2:-2, 2:-2]
        down = np.diff(inner[..., 0], axis=0).mean() * 2.0
        across = np.diff(inner[..., 1], axis=1).mean() * 0.5
        np.testing.assert_allclose(crop.gsd, (down, across), rtol=0.02)
        assert crop.gsd.dtype == np.float32
        factors.append(2.0 / crop.gsd[0])
    assert 0.49 < min(factors) < 0.6
    assert 1.7 < max(factors) < 2.02
    assert abs(np.mean(np.log(factors))) < 0.25


def test_the_mask_is_under_the_image():
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 5, (8, 8)), np.ones((16, 16))).astype(np.uint8)
    labelled = Labelled(np.float32(mask)[..., None], mask)
    how = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "quarter_turns": 1.0}
    for crop in crops(labelled, size=32, scale=(0.5, 2.0), **how):
        wrong = np.abs(crop.image[..., 0] - crop.mask) > 0.6
        edges = np.zeros((32, 32), bool)
        for axis in (0, 1):
            for shift in (-1, 1):
                edges |= np.roll(crop.mask, shift, axis) != crop.mask
        edges[[0, -1]] = edges[:, [0, -1]] = True
        assert not (wrong & ~edges).any()


def test_flips_and_quarter_turns():
    labelled = ramp(16, 16, gsd=(3.0, 1.0))
    seen = set()
    how = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "quarter_turns": 1.0}
    for crop in crops(labelled, **how):
        np.testing.assert_array_equal(crop.image[..., 1] % 7, crop.mask)
        turned = crop.image[0, 0, 0] != crop.image[0, -1, 0]
        np.testing.assert_array_equal(crop.gsd, (1, 3) if turned else (3, 1))
        seen.add(tuple(crop.image[[0, 0, -1], [0, -1, 0]].ravel()))
    assert len(seen) == 8


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 48:] = 1
    mask[:10] = IGNORE
    labelled = Labelled(np.float32(mask)[..., None], mask)
    assert largest_share(mask) == 0.75
    counts = {}
    for limit in (1.0, 0.75):
        found = crops(labelled, number=60, max_share=limit)
        counts[limit] = sum(largest_share(crop.mask) > 0.75 for crop in found)
    # 10 tries, and about a fifth of the places have both classes.
    assert counts[1.0] > 35 > 20 > counts[0.75]
    # Nothing better can be drawn; a crop comes all the same.
    assert len(crops(Labelled(labelled.image, mask * 0), number=1, max_share=0.5)) == 1
    assert largest_share(mask[:10]) == 1.0


def test_a_small_image_is_filled_up_and_does_not_count_there():
    for crop in crops(ramp(10, 40), number=5):
        np.testing.assert_array_equal(crop.mask[10:], IGNORE)
        assert (crop.mask[:10] != IGNORE).all()
        np.testing.assert_array_equal(crop.image[10:], crop.image[[9] * 6])


def test_pixels_without_a_value_do_not_leak():
    labelled = ramp(40, 40)
    valid = np.ones((40, 40), bool)
    valid[:, 20:] = False
    image = np.where(valid[..., None], 5, np.nan).astype(np.float32)
    labelled = dataclasses.replace(labelled, image=image, valid=valid)
    for crop in crops(labelled, scale=(0.5, 2.0)):
        assert set(np.unique(np.round(crop.image, 3))) <= {0.0, 5.0}


def test_crops_depend_on_the_seed_and_the_step_alone():
    source = [ramp(20 + i, 20, gsd=1.0 + i) for i in range(6)]

    def found(start, threads, seed=0):
        steps = crops_of_steps(
            source, sampler(scale=(0.5, 2.0)), batch_size=4, seed=seed, start=start,
            num_steps=6, threads=threads,
        )  # fmt: skip
        return list(steps)

    one, resumed, other = found(0, 1), found(2, 3), found(0, 2, seed=1)
    assert len(one) == 6
    for a, b in zip(one[2:], resumed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(one[0][0], other[0][0])
    assert [x.shape for x in one[0]] == [(4, 16, 16, 2), (4, 2), (4, 16, 16)]
    assert found(6, 1) == []
    plain = crops_of_steps(
        source, sampler(), batch_size=3, seed=0, start=0, num_steps=4
    )
    gsds = np.concatenate([gsd[:, 0] for _, gsd, _ in plain])
    assert sorted(gsds[:6]) == sorted(gsds[6:]) == [1, 2, 3, 4, 5, 6]
    assert list(gsds[:6]) != list(gsds[6:])


def test_the_loss_is_the_mean_over_pixels_that_count():
    rng = np.random.default_rng(0)
    found = jnp.asarray(rng.normal(size=(3, 4, 4, 5)), jnp.float32)
    masks = rng.choice([0, 1, 2, 3, 4, IGNORE], (3, 4, 4)).astype(np.uint8)
    masks[1] = IGNORE  # an image without a pixel does not change the others' weight
    counted = masks != IGNORE
    expected = optax.softmax_cross_entropy_with_integer_labels(
        found[counted], masks[counted].astype(int)
    ).mean()
    assert segment.cross_entropy(found, masks) == pytest.approx(float(expected))
    changed = found.at[1].add(100.0)
    assert segment.cross_entropy(changed, masks) == pytest.approx(float(expected))
    assert segment.cross_entropy(found, np.full_like(masks, IGNORE)) == 0


# Training.


def test_batch_norm_and_loss_are_over_the_batch_of_all_devices():
    one, four = (run_on_devices("tests.support.segment_on_devices", n) for n in (1, 4))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    for name in ("mean", "gradient"):
        np.testing.assert_allclose(one[name], four[name], rtol=1e-3, atol=1e-6)
    assert four["collectives"]


def tiny_recipe(frozen, **changes):
    recipe = recipes.frozen_upernet() if frozen else recipes.trained_upernet()
    recipe.update(
        batch_size=8, num_steps=40, warmup_steps=4, learning_rate=1e-2, crop=16,
        overlap=4, crop_scale=(0.8, 1.25), channels=16, **changes,
    )  # fmt: skip
    recipes.check(recipe)
    return recipe


@pytest.mark.parametrize("frozen", [True, False])
def test_it_learns_a_few_scenes(frozen):
    encoder, recipe = tiny_encoder(depth=1), tiny_recipe(frozen)
    before = jax.tree.map(np.array, nnx.state(encoder.network))
    plan = recipes.create_plan_of_steps(recipe)
    learner = segment.create_learner(
        encoder, 3, plan, recipe=recipe, frozen=frozen, seed=0
    )
    trained = {str(path[0]) for path, _ in nnx.to_flat_state(learner.state.params)}
    assert trained == ({"head"} if frozen else {"head", "encoder"})
    source = some_scenes(np.random.default_rng(0))
    draw = segment.create_sampler(encoder, recipe)
    state, losses = learner.state, []
    for images, gsd, masks in crops_of_steps(
        source, draw, batch_size=8, seed=0, start=0, num_steps=plan.num_steps
    ):
        state, loss = learner.step(state, images, gsd, masks)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(3), abs=0.15)
    assert np.mean(losses[-5:]) < 0.35 * losses[0]
    matrices = segment.confusions(
        lambda images, gsd: learner.predict(state, images, gsd),
        source,
        normalize=draw.normalize,
        recipe=recipe,
        num_classes=3,
    )
    np.testing.assert_array_equal(matrices.sum((1, 2)), [23 * 24] * 4)
    assert scores(matrices).miou > 0.7
    # The encoder that was given is as it was.
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(encoder.network))


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlap", 512), ("warmup_steps", 80_000), ("max_share", 1.5), ("crop", 1)],
)
def test_recipes_of_segmentation_are_checked(name, value):
    for new in (recipes.frozen_upernet, recipes.trained_upernet):
        recipe = new()
        recipes.check(recipe)
        recipe[name] = value
        with pytest.raises(UserError, match=f"recipe.{name}={value}"):
            recipes.check(recipe)
