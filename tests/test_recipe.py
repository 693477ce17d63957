"""The recipes of trained classifiers: their fields, ranges, schedules and crops."""

import math

import numpy as np
import pytest

from tests.support.rows import PROTOCOL
from tests.support.sources import ColourSource
from xsmae.cli import finetune
from xsmae.cli import probe as linear_probe
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.rows import Protocol

RECIPES = {
    "probe": recipe.published_probe,
    "finetune": recipe.finetuning,
    "frozen_upernet": recipe.frozen_upernet,
    "trained_upernet": recipe.trained_upernet,
    "linear_segmentation": recipe.linear_segmentation,
}
FIELDS = [(kind, name) for kind, new in RECIPES.items() for name in new()]


def changed(value):
    if isinstance(value, str):
        return {"bicubic": "bilinear", "float32": "bfloat16"}[value]
    if isinstance(value, tuple):
        return (value[0] * 1.1, value[1])
    return value * 2 + 1 if isinstance(value, int) else value / 2 + 1e-3


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_is_in_the_protocols_key(kind, name):
    def key(fields):
        content = {**vars(PROTOCOL), "options": recipe.describe(fields)}
        return Protocol(**content).key

    fields, other = RECIPES[kind](), RECIPES[kind]()
    other[name] = changed(other[name])
    recipe.check(other)
    assert key(fields) == key(RECIPES[kind]()) != key(other)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_has_a_range(kind, name):
    fields = RECIPES[kind]()
    recipe.check(fields)
    wrong = {str: "none", tuple: (0.5, 0.1)}.get(type(fields[name]), -1)
    fields[name] = wrong
    with pytest.raises(UserError, match=rf"^recipe.{name}=.*, expected ") as caught:
        recipe.check(fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("layer_decay", 1.0),
        *((name, 0.0) for name in (
            "drop_path", "mixup", "cutmix", "random_erasing", "label_smoothing",
            "weight_decay", "warmup_epochs", "horizontal_flip",
        )),
    ],
)  # fmt: skip
def test_a_part_can_be_off(name, off):
    fields = recipe.finetuning()
    fields[name] = off
    recipe.check(fields)


def test_the_schedule():
    """500 images in tens: 50 steps an epoch; 20 epochs, the first 4 warm-up."""
    fields = recipe.finetuning()
    fields.update(batch_size=10, epochs=20.0, warmup_epochs=4.0, learning_rate=0.512)
    plan = recipe.create_plan(fields, num_images=500)
    peak, least = 0.512 * 10 / 256, 1e-6
    assert plan.num_steps == 1000
    for step, share in ((0, 0.0), (50, 0.25), (100, 0.5), (200, 1.0)):
        assert plan.learning_rate(step) == pytest.approx(share * peak)
    for step in (400, 600, 1000):
        cosine = (1 + math.cos(math.pi * (step - 200) / 800)) / 2
        expected = least + (peak - least) * cosine
        assert plan.learning_rate(step) == pytest.approx(expected, rel=1e-5)


def test_fewer_images_than_a_batch():
    said = r"recipe.batch_size=256 is more than the 9 .*--recipe.batch_size=9"
    with pytest.raises(UserError, match=said):
        recipe.create_plan(recipe.finetuning(), num_images=9)


def test_crops_have_the_area_of_the_recipe_and_their_own_gsd():
    crops = recipe.create_crops(recipe.published_probe(), size=8)
    image = ColourSource(1)[0].image  # 12 x 16
    areas, flips = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sample = crops(image, 2.0, rng=rng, batch_rng=rng)
        top, left, bottom, right = sample["box"][0]
        areas.append((bottom - top) * (right - left) / 192)
        expected = [2.0 * (bottom - top) / 8, 2.0 * (right - left) / 8]
        np.testing.assert_allclose(sample["gsd"][0], expected, rtol=1e-5)
        flips.append(sample["flip"])
    assert min(areas) >= 0.08 - 1e-6
    assert min(areas) < 0.1
    assert max(areas) > 0.9
    np.testing.assert_allclose(np.mean(flips, axis=0), [0, 0.5], atol=0.1)


SMALL = [
    "--encoder=random:tiny,embed_dim=16,depth=1,num_heads=2,patch_size=8",
    "--data=configs/quickstart.py",
    "--data.size=32",
    "--train.num_images=20",
    "--test.num_images=10",
]


@pytest.mark.parametrize(
    ("binary", "flags", "said"),
    [
        (linear_probe, ["--protocol=other"], "protocol"),
        (linear_probe, ["--recipe.epochs=3"], "--recipe.epochs=3"),
        (linear_probe, ["--num_workers=1"], "--num_workers has no meaning for"),
        (
            linear_probe,
            ["--protocol=published", "--penalties=1"],
            "--penalties has no meaning for protocol=published",
        ),
        (linear_probe, ["--protocol=published", "--recipe.mixup=1"], "recipe.mixup=1"),
        (
            linear_probe,
            ["--protocol=published", "--recipe.warmup_epochs=50"],
            "recipe.warmup_epochs=50, expected less than recipe.epochs=50",
        ),
        (
            linear_probe,
            ["--protocol=published"],
            "recipe.batch_size=512 is more than the 20",
        ),
        (finetune, ["--recipe.mixup=-1"], "recipe.mixup=-1.0, expected"),
        (finetune, ["--recipe.epochs=nan"], "recipe.epochs=nan, expected"),
        (finetune, ["--recipe.crop_area=(0.5,2.0)"], "recipe.crop_area=(0.5, 2.0)"),
        (finetune, ["--recipe.layer_decay=0"], "recipe.layer_decay=0.0"),
        (finetune, ["--recipe.no_such=1"], "recipe.no_such"),
        (finetune, ["--missing_bands=mean"], "--missing_bands has no meaning for"),
        (
            finetune,
            ["--recipe.epochs=many"],
            "xsmae: --recipe.epochs=many: expected a number",
        ),
        (finetune, ["--num_workers=-1"], "num_workers"),
        (finetune, ["--feature=no"], "feature=no, expected one or both of"),
        (finetune, ["--encoder=statistics"], "encoder=statistics has no weights"),
        (finetune, ["--encoder=thumbnail"], "encoder=thumbnail has no weights"),
    ],
)
def test_wrong_flags_are_one_line(binary, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = any(flag.startswith("--encoder=") for flag in flags)
    small = [f for f in SMALL if not (given and f.startswith("--encoder="))]
    assert binary.main(["xsmae", *small, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("xsmae: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()
