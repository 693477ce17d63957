"""Cross-scale distillation: coarse views, their targets, the teacher, the losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xsmae.configs import common

from tests.support.models import MODEL, some_batch, some_views
from xsmae import losses
from xsmae.methods import METHODS
from xsmae.models.mae import Views
from xsmae.models.scale_distill import CoarseViews, Teacher
from xsmae.ops import resize
from xsmae.trainer import create_trainer

METHOD = METHODS["scale_distill"]
FIELDS = METHOD.fields("recommended", size="tiny", model=MODEL)
LOSS = FIELDS["loss"]


def model_of(**changes):
    # Views of 16 px and patches of 4: coarse views of 8 and 4 px.
    return {**MODEL, **FIELDS["model"], "coarse_scales": (0.5, 0.25), **changes}


def built(**changes):
    return METHOD.build(model_of(**changes), channels=3, view_size=16, rngs=nnx.Rngs(0))


def noise_for(network, batch=3, seed=1):
    shape = (batch, 2, network.noise_size(16, 16))
    return jax.random.uniform(jax.random.key(seed), shape)


def mean_in(image, box, row, column, size, seen):
    """The mean of a cell of a box by a loop over pixels, and the part that was seen."""
    height, width = image.shape[:2]
    tops = box[0] + (box[2] - box[0]) * np.arange(size[0] + 1) / size[0]
    lefts = box[1] + (box[3] - box[1]) * np.arange(size[1] + 1) / size[1]
    y0, y1 = tops[row] * height, tops[row + 1] * height
    x0, x1 = lefts[column] * width, lefts[column + 1] * width
    total, weight = np.zeros(image.shape[2]), 0.0
    for y in range(height):
        for x in range(width):
            down = max(0, min(y1, y + 1) - max(y0, y))
            across = max(0, min(x1, x + 1) - max(x0, x))
            total += down * across * seen[y, x] * image[y, x]
            weight += down * across * seen[y, x]
    return total / max(weight, 1e-9), weight / ((y1 - y0) * (x1 - x0))


def test_boxes_are_averaged_as_a_loop_averages_them():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 8, 12, 2)).astype(np.float32)
    valid = rng.random((3, 8, 12)) < 0.7
    box = np.array([[0, 0, 1, 1], [0.1, 0.25, 0.73, 0.9], [0.5, 0, 1, 0.5]], np.float32)
    means, none = resize.area_of_boxes(jnp.asarray(images), jnp.asarray(box), (2, 3))
    assert none is None
    of_valid, found = resize.area_of_boxes(
        jnp.asarray(images), jnp.asarray(box), (2, 3), jnp.asarray(valid)
    )
    for index, row, column in np.ndindex(3, 2, 3):
        at = index, row, column
        every = np.ones(valid.shape[1:])
        expected, _ = mean_in(images[index], box[index], row, column, (2, 3), every)
        np.testing.assert_allclose(means[at], expected, atol=1e-5)
        expected, part = mean_in(
            images[index], box[index], row, column, (2, 3), valid[index]
        )
        assert bool(found[at]) == (part >= 0.5)
        expected = expected if part >= 0.5 else 0
        np.testing.assert_allclose(of_valid[at], expected, atol=1e-5)


def test_a_whole_view_is_averaged_as_area_does():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)))
    whole = jnp.tile(jnp.array([0.0, 0, 1, 1]), (2, 1))
    for side in (8, 4):
        found, _ = resize.area_of_boxes(images, whole, (side, side))
        np.testing.assert_allclose(found, resize.area(images, (side, side)), atol=1e-6)


def test_boxes_lie_in_the_view_and_enlarge_nothing():
    uniform = jax.random.uniform(jax.random.key(0), (500, 6))
    coarse = CoarseViews((8, 4), (0.1, 0.6))
    for side, box in zip(coarse.sides, coarse.boxes(uniform, (16, 16)), strict=True):
        box = np.asarray(box)
        assert box.min() >= 0
        assert box.max() <= 1 + 1e-6
        sides = box[:, 2:] - box[:, :2]
        np.testing.assert_allclose(sides[:, 0], sides[:, 1], atol=1e-6)
        low, high = max(0.1**0.5, side / 16), 0.6**0.5
        assert low - 1e-6 <= sides.min() < low + 0.02
        assert high - 0.02 < sides.max() <= high + 1e-6
        assert len(np.unique(box[:, 0])) > 300
    whole = CoarseViews((8, 4)).boxes(uniform, (16, 16))
    np.testing.assert_allclose(whole[0], np.tile([0, 0, 1, 1], (500, 1)), atol=1e-6)


@pytest.mark.parametrize("position", ["fixed", "gsd"])
def test_coarse_views_are_what_the_encoder_sees(position):
    network = built(coarse_area=(0.3, 0.9), position=position)
    views, noise = some_views(), noise_for(network)
    output = network(views, noise)
    assert output.coarse.shape == (3, 2, 16)
    boxes = network.coarse.boxes(noise[:, 0, 16:], (16, 16))
    for index, (side, box) in enumerate(zip((8, 4), boxes, strict=True)):
        images, _ = resize.area_of_boxes(views.images[:, 0], box, (side, side))
        metres = (box[:, 2:] - box[:, :2]) * views.gsd[:, 0] * 16
        corner = box[:, :2] * views.gsd[:, 0] * 16
        tokens = network.encoder(
            images,
            gsd=metres / side,
            offset=corner / 4 if position == "gsd" else None,
        )
        np.testing.assert_allclose(
            output.coarse[:, index], tokens[:, 1:].mean(axis=1), atol=2e-6
        )


def test_view_1_is_reconstructed_as_the_mae_does():
    network = built()
    views, noise = some_views(), noise_for(network)
    output = network(views, noise)
    whole = network.mae(views, noise[..., :16])
    assert output.pred.shape[1] == 1
    np.testing.assert_allclose(output.pred[:, 0], whole.pred[:, 0], atol=1e-5)
    expected = whole.encoder_tokens[:, :, 1:].mean(axis=2)
    np.testing.assert_allclose(output.embedding, expected, atol=1e-6)
    # Without a teacher, the visible tokens are the target.
    np.testing.assert_allclose(output.target, expected[:, 0], atol=1e-6)


def test_the_teacher_sees_all_of_view_1():
    network = built(teacher="ema", teacher_momentum=0.5)
    views, noise = some_views(), noise_for(network)
    output = network(views, noise)
    whole = network.encoder(views.images[:, 0], gsd=views.gsd[:, 0])[:, 1:]
    np.testing.assert_allclose(output.target, whole.mean(axis=1), atol=1e-6)
    for size, targets, counts in zip(
        (2, 1), output.target_patches, output.counts, strict=True
    ):
        grid = whole.reshape(3, 4, 4, 16)
        means = resize.area(grid, (size, size)).reshape(3, size * size, 16)
        np.testing.assert_allclose(targets, means, atol=2e-6)
        np.testing.assert_allclose(counts, 1, atol=1e-6)


def test_targets_of_patches_are_the_seen_tokens_of_the_same_ground():
    network = built(coarse_area=(0.3, 0.9))
    views, noise = some_views(), noise_for(network)
    output = network(views, noise)
    boxes = network.coarse.boxes(noise[:, 0, 16:], (16, 16))
    encoded = network.mae.encode(views, noise[..., :16])
    ids = np.asarray(encoded.masking.ids_keep[:, 0])
    for sample, index in np.ndindex(3, 2):
        tokens, seen = np.zeros((16, 16)), np.zeros(16)
        tokens[ids[sample]] = encoded.tokens[sample, 0, 1:]
        seen[ids[sample]] = 1
        size = (2, 1)[index]
        for row, column in np.ndindex(size, size):
            expected, part = mean_in(
                tokens.reshape(4, 4, 16), np.asarray(boxes[index][sample]),
                row, column, (size, size), seen.reshape(4, 4),
            )  # fmt: skip
            at = sample, row * size + column
            assert float(output.counts[index][at]) == pytest.approx(part, abs=1e-5)
            if part > 1e-3:
                found = output.target_patches[index][at]
                np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_the_coarse_side_learns():
    rng = np.random.default_rng(0)
    coarse = jnp.asarray(rng.normal(size=(4, 2, 8)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    options = {"temperature": 0.1, "positive_in_denominator": False}
    term = functools.partial(losses.scale_distillation, **options)
    expected = [
        losses.contrastive(jnp.stack([target, one], axis=1), **options)
        for one in (coarse[:, 0], coarse[:, 1])
    ]
    assert float(term(coarse, target)) == pytest.approx(
        float(sum(expected)) / 2, rel=1e-5
    )
    to_coarse, to_target = jax.grad(term, argnums=(0, 1))(coarse, target)
    assert np.abs(to_coarse).max() > 0.01
    np.testing.assert_array_equal(to_target, 0)


def test_dense_distillation_by_hand():
    rng = np.random.default_rng(0)
    shapes = [(2, 4, 8), (2, 1, 8)]
    predicted, target = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    counts = [rng.random((2, 4)), np.zeros((2, 1))]
    found = losses.dense_distillation(
        [jnp.asarray(x) for x in predicted],
        [jnp.asarray(x) for x in target],
        [jnp.asarray(x) for x in counts],
    )
    cosine = (predicted[0] * target[0]).sum(-1) / (
        np.linalg.norm(predicted[0], axis=-1) * np.linalg.norm(target[0], axis=-1)
    )
    # The second view has no patch that counts, so it adds 0.
    expected = ((1 - cosine) * counts[0]).sum() / max(counts[0].sum(), 1) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(
        lambda x: losses.dense_distillation([jnp.asarray(predicted[0])], [x], counts)
    )(jnp.asarray(target[0]))
    np.testing.assert_array_equal(gradient, 0)


def test_the_teacher_follows_slowly():
    network = built(teacher="ema", teacher_momentum=0.75)
    before = [np.array(x[...]) for x in network.teacher.average]
    own = jax.tree.leaves(nnx.state(network.encoder, nnx.Param))
    for mean, new in zip(before, own, strict=True):
        np.testing.assert_array_equal(mean, new)
    params = nnx.state(network.encoder, nnx.Param)
    nnx.update(network.encoder, jax.tree.map(lambda x: x + 1, params))
    network.teacher.step(network.encoder)
    for mean, old in zip(network.teacher.average, before, strict=True):
        np.testing.assert_allclose(mean[...], old + 0.25, atol=1e-6)
    assert isinstance(network.teacher, Teacher)
    assert not set(jax.tree.leaves(nnx.state(network.teacher, nnx.Param)))


def trainer_of(**changes):
    config = common.get_common("recommended", "tiny", "scale_distill")
    config.batch_size, config.num_steps, config.views.size = 8, 60, 16
    config.optim.warmup_steps, config.optim.learning_rate = 2, 0.05
    config.model.update(
        patch_size=4, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8,
        decoder_depth=1, decoder_num_heads=2, dtype="float32",
        coarse_scales=(0.5, 0.25),
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return create_trainer(config, num_images=100)


def test_one_batch_is_learned_with_a_teacher():
    trainer = trainer_of(
        **{"model.teacher": "ema", "loss.dense_distillation.weight": 0.5}
    )
    state, batch, found = trainer.initial_state(), some_batch(8), []
    initial = jax.tree.leaves(state.batch_stats)
    initial = [np.array(x) for x in initial]
    for _ in range(60):
        state, metrics = trainer.step(state, batch)
        found.append({name: float(value) for name, value in metrics.items()})
    terms = [f"loss/{name}" for name in LOSS]
    assert found[0]["loss"] == pytest.approx(
        sum(w * found[0][n] for w, n in zip((1, 1, 0.5, 0.5), terms, strict=True)),
        rel=1e-5,
    )
    for name in terms:
        assert found[-1][name] < found[0][name], name
    # The teacher moved, and less than the encoder.
    moved = jax.tree.leaves(state.batch_stats)
    encoder = jax.tree.leaves(state.params["mae"]["encoder"])
    far = sum(np.abs(a - b).sum() for a, b in zip(encoder, initial, strict=True))
    near = sum(np.abs(a - b).sum() for a, b in zip(moved, initial, strict=True))
    assert 0 < near < 0.5 * far


def test_pixels_that_are_not_valid_change_nothing():
    network = built(coarse_area=(0.3, 1.0))
    views, noise = some_views(), noise_for(network)
    valid = np.ones(views.images.shape[:-1], bool)
    valid[:, 0, :7, :9] = False
    valid[0, 0, :8, :8] = False  # a patch of the coarse view of 8 px and more
    found = []
    for fill in (0.0, 1e3):
        images = jnp.where(valid[..., None], views.images, fill)
        filled = Views(images, views.gsd, views.box, valid=jnp.asarray(valid))
        found.append(network(filled, noise).coarse)
    np.testing.assert_allclose(*found, atol=1e-6)
    assert np.abs(found[0] - network(views, noise).coarse).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "no"}, "teacher='no', expected one of"),
        ({"coarse_scales": ()}, r"coarse_scales=\(\), expected one or more"),
    ],
)
def test_wrong_fields_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        built(**changes)
