"""Segmentation heads in folders: saved, loaded, damaged."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import xsmae
from tests.support.encoders import make_encoder, tiny_encoder
from tests.support.segmentation import some_scenes
from xsmae.bands import Bands
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.segmentation import dense
from xsmae.evaluation.tasks import segment
from xsmae.evaluation.tasks.segment_frozen import fit_linear
from xsmae.models.pixel_linear import PixelLinear
from xsmae.ops import resize
from xsmae.weights.encoder import Encoder
from xsmae.weights.head import save_head

CLASSES = ("roof", "road", "tree")
COLOURS = ((200, 0, 0), (120, 120, 120), (0, 150, 0))
SMALL = {"batch_size": 8, "num_steps": 3, "crop": 16, "overlap": 4}


def saved(folder, encoder, state, kind, recipe, **changes):
    options = {"colours": COLOURS, "training": {"protocol": {"seed": 0}}, **changes}
    save_head(
        folder, encoder, state, kind=kind, classes=CLASSES, recipe=recipe, **options
    )
    return folder


def save_upernet(folder, kind, **changes):
    """A head with random weights and statistics, and the learner's own predict.

    Training takes longer to compile than all else; noise stands for it.
    """
    frozen, encoder = kind != "trained", tiny_encoder(depth=1)
    recipe = recipes.frozen_upernet() if frozen else recipes.trained_upernet()
    recipe.update(
        SMALL | {"warmup_steps": 0, "learning_rate": 1e-2, "channels": 8} | changes
    )
    plan = recipes.create_plan_of_steps(recipe)
    learner = segment.create_learner(
        encoder, 3, plan, recipe=recipe, frozen=frozen, seed=0
    )
    rng = np.random.default_rng(0)

    def noisy(array):
        return array + rng.uniform(0, 0.05, array.shape).astype(np.float32)

    params, batch_stats = (
        jax.tree.map(noisy, part)
        for part in (learner.state.params, learner.state.batch_stats)
    )
    state = dataclasses.replace(learner.state, params=params, batch_stats=batch_stats)
    saved(folder, encoder, state, "upernet", recipe)
    return functools.partial(learner.predict, state)


def train_linear(folder):
    encoder, recipe = tiny_encoder(depth=1), recipes.linear_segmentation()
    recipe.update(**SMALL, learning_rate=0.05)
    tokens = dense.last_tokens(encoder)
    normalize = Bands.of(encoder.info).normalize
    scenes = some_scenes(np.random.default_rng(0))
    found = dense.window_features(
        tokens, scenes, normalize=normalize, crop=16, batch_size=4
    )
    plan = recipes.create_plan_of_steps(recipe)
    fitted = fit_linear(tokens, *found, 3, plan, recipe=recipe, seed=0)
    saved(folder, encoder, fitted.state, "linear", recipe)
    return fitted


@pytest.mark.parametrize("kind", ["frozen", "trained", "linear"])
def test_a_loaded_head_predicts_as_the_trained_one(tmp_path, kind):
    if kind == "linear":
        predict = train_linear(tmp_path)
    else:
        # The frozen one has batch norm, the other one group norm.
        other = {} if kind == "frozen" else {"dtype": "bfloat16", "batch_size": 4}
        predict = save_upernet(tmp_path, kind, **other)
    head = xsmae.load_head(tmp_path)
    assert head.classes == CLASSES
    assert head.colours == COLOURS
    assert (head.crop, head.overlap) == (16, 4)
    assert head.info["training"] == {"protocol": {"seed": 0}}
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    gsd = np.float32([[1, 1], [2, 1], [0.5, 0.5], [4, 4]])
    expected = np.asarray(predict(head.encoder.bands.normalize(images), gsd))
    found = np.asarray(head.predict(images, gsd=gsd))
    assert found.shape == (4, 16, 16, 3)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The trained encoder is the one that is saved.
    given = tiny_encoder(depth=1)
    same = head.info["encoder"] == Encoder(given.network, given.info).digest
    assert same == (kind != "trained")
    assert head.encoder.dtype == ("bfloat16" if kind == "trained" else "float32")


def test_an_encoder_with_fixed_positions_needs_no_gsd(tmp_path):
    encoder = xsmae.load_encoder(make_encoder(tmp_path / "given"))
    options = {"momentum": 0.1, "epsilon": 1e-6, "head_std": 1.0}
    model = PixelLinear(16, 3, **options, rngs=nnx.Rngs(0))
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    state = SimpleNamespace(params=params, batch_stats=batch_stats)
    recipe = {"batch_norm_epsilon": 1e-6, "crop": 16, "overlap": 4}
    head = xsmae.load_head(saved(tmp_path, encoder, state, "linear", recipe))
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3))
    found = np.asarray(head.predict(images))
    np.testing.assert_array_equal(found, head.predict(images, gsd=3.0))
    tokens = encoder.tokens(images)[:, 1:].reshape(2, 4, 4, 16)
    expected = resize.bilinear(model(tokens, size=(4, 4), training=False), (16, 16))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    save_upernet(folder, "frozen")
    return folder


def test_images_that_it_cannot_read_are_refused(folder):
    head = xsmae.load_head(folder)
    images = np.zeros((1, 16, 16, 3), np.uint8)
    for wrong, gsd, match in (
        (images[..., :2], 1.0, "red, green, blue"),
        (images[:, :15], 1.0, "15x16"),
        (images[:, :4], 1.0, "4x16"),
        (images, None, "gsd"),
        (images, -1.0, "gsd=-1"),
    ):
        with pytest.raises(UserError, match=match):
            head.predict(wrong, gsd=gsd)


def test_the_digest_follows_what_changes_scores(folder, tmp_path):
    head = xsmae.load_head(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy, training={"other": 1})
    assert xsmae.load_head(copy).digest == head.digest
    change(copy, overlap=5)
    assert xsmae.load_head(copy).digest != head.digest


def change(folder, **fields):
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CHANGES = {
    "schema": 2, "task": "knn", "kind": "convolution", "classes": [], "crop": 1.5,
    "overlap": 16, "architecture": {"norm": "batch"}, "encoder": "0" * 16,
    "weights": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_other_descriptions_are_refused_by_name(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy, **{name: CHANGES[name]})
    # The weights are named by their file.
    match = {"architecture": "inconsistent", "weights": "head.safetensors"}
    with pytest.raises(UserError, match=match.get(name, name)) as caught:
        xsmae.load_head(copy)
    assert "\n" not in str(caught.value)


def test_every_damaged_file_is_refused_by_name(folder, tmp_path):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        for damage in ("missing", "cut", "flipped", "empty"):
            copy = tmp_path / f"{path.name}_{damage}"
            shutil.copytree(folder, copy)
            target, content = copy / path.relative_to(folder), path.read_bytes()
            if damage == "missing":
                target.unlink()
            elif damage == "cut":
                target.write_bytes(content[: len(content) // 2])
            elif damage == "empty":
                target.write_bytes(b"")
            elif path.suffix == ".safetensors":
                place = len(content) - 2
                flipped = bytes([content[place] ^ 1])
                target.write_bytes(content[:place] + flipped + content[place + 1 :])
            else:
                continue
            with pytest.raises(UserError) as caught:
                xsmae.load_head(copy)
            assert "\n" not in str(caught.value)
            assert str(copy) in str(caught.value)


def test_a_head_of_another_number_of_classes_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy, classes=[{"name": "a"}, {"name": "b"}])
    with pytest.raises(UserError, match=r"\(2,\), found \(3,\)"):
        xsmae.load_head(copy)
