"""`xsmae segment`: rows, what is kept beside them, resuming, refusals."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import xsmae
from tests.support.encoders import make_encoder
from tests.support.segmentation import Labelled, ramp
from xsmae import cli
from xsmae.cli import results, segment
from xsmae.data.mask_classes import IGNORE
from xsmae.errors import UserError
from xsmae.evaluation.rows import read
from xsmae.evaluation.segmentation import cache
from xsmae.evaluation.segmentation.evaluate import OTHERS
from xsmae.evaluation.segmentation.heads import HEADS, Head, recipe_of
from xsmae.evaluation.segmentation.kept import read_kept
from xsmae.evaluation.segmentation.scaled import Scaled
from xsmae.evaluation.segmentation.scores import bootstrap, confusion, scores
from xsmae.evaluation.tasks.segment import guesses
from xsmae.weights.head import load_head
from xsmae.weights.layouts import leaves

LAND = [
    "--data=synthetic_land", "--data.size=32", "--train.num_images=5",
    "--test.num_images=3",
]  # fmt: skip
RECIPE = ["--recipe.crop=16", "--recipe.overlap=4", "--recipe.batch_size=4"]
TINY = "--encoder=random:tiny,patch_size=4,embed_dim=16,depth=1,num_heads=2"


def places(folder):
    return [
        f"--results={folder}/results.jsonl", f"--out={folder}/out",
        f"--cache={folder}/cache",
    ]  # fmt: skip


def run(arguments, should_stop=lambda: False):
    return segment.evaluate(["xsmae segment", *arguments], should_stop)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """The folder and the command of a linear head at two scales, with controls."""
    folder = tmp_path_factory.mktemp("linear")
    make_encoder(folder / "encoder")
    command = [
        f"--encoder={folder / 'encoder'}", *LAND, *RECIPE, *places(folder),
        "--head=linear", "--recipe.num_steps=12", "--scales=50,100",
    ]  # fmt: skip
    assert segment.main(["xsmae segment", *command]) == 0
    return folder, command


def test_a_row_follows_from_its_confusion_matrices(linear):
    folder, _ = linear
    rows = read(folder / "results.jsonl")
    kinds = [(row.encoder["kind"], row.scale) for row in rows]
    assert kinds == [
        (kind, scale)
        for kind in ("encoder", "random", "statistics")
        for scale in (50.0, 100.0)
    ]
    for row in rows:
        kept = read_kept(folder / "out" / row.identity)
        assert row.files == str(folder / "out" / row.identity)
        found, interval = scores(kept.confusions), bootstrap(kept.confusions, seed=0)
        assert kept.confusions.sum() == 3 * 32 * 32  # masks at full size at any scale
        np.testing.assert_array_equal(kept.confusions.sum(0), row.confusion)
        assert (row.value, row.low) == (found.miou, interval.low.miou)
        assert set(row.metrics) == set(OTHERS.values())
        assert row.metrics["pixel accuracy"][0] == found.accuracy
        assert row.metrics["pixel accuracy"][2] == interval.high.accuracy
        counted = found.iou[~np.isnan(found.iou)]
        np.testing.assert_array_equal(list(row.per_class.values()), counted)
        assert np.mean(counted) == pytest.approx(row.value)
        assert len(kept.ids) == 3
        assert (folder / "out" / row.identity / "examples.png").exists()
    assert len({row.protocol.key for row in rows}) == 1
    protocol = rows[0].protocol
    assert (protocol.task, protocol.metric) == ("segment_linear", "mIoU")
    assert protocol.options["num_steps"] == 12
    assert protocol.options["encoder"] == "frozen"


def test_the_head_of_the_encoder_gives_its_confusion_matrices(linear):
    folder, _ = linear
    rows = read(folder / "results.jsonl")
    heads = [row for row in rows if (folder / "out" / row.identity / "head").exists()]
    assert [row.encoder["kind"] for row in heads] == ["encoder", "encoder"]
    head = load_head(folder / "out" / heads[1].identity / "head")
    assert head.classes == tuple(heads[1].class_names)
    assert len(head.colours) == 7
    assert head.info["training"]["protocol"] == heads[1].protocol.key
    from xsmae.data.synthetic.labelled import LandSource

    test = LandSource(3, seed=1, size=32)
    predicted = guesses(
        head.predict,
        test,
        normalize=lambda image: image,
        recipe={"crop": 16, "overlap": 4, "batch_size": 4},
    )
    found = sum(confusion(g.mask, g.predicted, 7) for g in predicted)
    assert np.abs(found - heads[1].confusion).sum() <= 4  # ties between two classes


def test_a_row_that_exists_is_not_measured_again(linear, capsys):
    folder, command = linear
    file = folder / "results.jsonl"
    before = file.read_text()
    rows = run(command)
    assert file.read_text() == before
    assert capsys.readouterr().out.count("already has its row") == 6
    lines = before.splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]))
    again = run(command)
    assert capsys.readouterr().out.count("already has its row") == 5
    assert json.loads(file.read_text().splitlines()[-1])["scale"] == 100.0
    assert [row.value for row in again] == [row.value for row in rows]
    assert again[3].confusion == rows[3].confusion


def test_python_gives_the_rows_of_the_command(linear, tmp_path, monkeypatch, capsys):
    folder, _ = linear
    monkeypatch.chdir(tmp_path)
    train, test = (
        xsmae.open_source("synthetic_land", num_images=n, seed=seed, size=32)
        for seed, n in enumerate((5, 3))
    )
    recipe = {"crop": 16, "overlap": 4, "batch_size": 4, "num_steps": 12}
    options = {"recipe": recipe, "controls": False, "data_name": "synthetic_land"}
    encoder = xsmae.load_encoder(folder / "encoder")
    (row,) = xsmae.segment(encoder, train, test, **options, progress=False)
    expected = read(folder / "results.jsonl")[1]
    assert (row.identity, row.scale, row.files) == (expected.identity, 100.0, None)
    assert row.confusion == expected.confusion
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    # With files, a second call measures nothing.
    places = {"results": "rows.jsonl", "out": "out"}
    for _ in range(2):
        (kept,) = xsmae.segment(encoder, train, test, **options, **places)
        assert kept.confusion == expected.confusion
    assert "already has its row" in capsys.readouterr().out
    assert xsmae.read_results("rows.jsonl") == [kept]
    assert {path.name for path in (tmp_path / kept.files).iterdir()} == {
        "confusions.npz", "examples.npz", "examples.png", "head",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "mlp"}, "head='mlp', expected one of linear, knn, upernet"),
        ({"recipe": {"steps": 3}}, r"recipe.steps .* num_steps"),
        ({"recipe": {"crop": 64, "overlap": 64}}, "recipe.overlap=64, expected less"),
        ({"freeze": False}, "--head=linear reads a frozen"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_python_cannot_measure(changes, said):
    world = [
        xsmae.open_source("synthetic_land", num_images=1, seed=s, size=32)
        for s in (0, 1)
    ]
    with pytest.raises(UserError, match=said):
        xsmae.segment("statistics", *world, **changes)


def test_the_report_has_all_metrics_and_pictures(linear, tmp_path):
    folder, _ = linear
    assert results.main(
        ["xsmae results", str(folder / "results.jsonl"), f"--out={tmp_path}"]
    ) == 0  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    for words in ("mIoU in percent", "frequency-weighted IoU", "IoU water", "16 px"):
        assert words in text
    table = [line for line in text.splitlines() if line.startswith("| statistics")]
    assert len(table) == 3  # its mIoUs, then the other metrics of both scales
    assert len(list(tmp_path.glob("confusion_*.png"))) == 3
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert "; mean accuracy=0." in lines[0]["metrics"]
    assert lines[0]["per_class"].startswith("field=")
    assert len(list(tmp_path.glob("scales_*.png"))) == 1
    assert len(list(tmp_path.glob("classes_*.png"))) == 1


def test_dense_knn_with_a_fixed_gsd(tmp_path):
    command = [TINY, *LAND, *RECIPE, *places(tmp_path), "--head=knn", "--recipe.k=3"]
    (row,) = run([*command, "--gsd=fixed"])
    assert row.protocol.task == "segment_knn"
    assert row.protocol.gsd_policy == "fixed"
    assert row.protocol.options["k"] == 3
    assert 0 <= row.low <= row.value <= row.high <= 1
    assert not (tmp_path / "out" / row.identity / "head").exists()


def test_stopped_features_resume_and_knn_reads_those_of_linear(
    tmp_path, monkeypatch, capsys
):
    computed, compute = [], cache.window_features

    def counted(dense, images, **how):
        if len(computed) == stop_after:
            raise KeyboardInterrupt  # stops like a kill
        computed.append(len(images))
        return compute(dense, images, **how)

    monkeypatch.setattr(cache, "window_features", counted)
    command = [TINY, *LAND, *RECIPE, "--nocontrols"]
    linear = ["--head=linear", "--recipe.num_steps=3"]
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run([*command, *linear, *places(tmp_path)])
    stop_after = None
    (row,) = run([*command, *linear, *places(tmp_path)])
    # An image of 32 pixels has four windows of 16, which are a batch.
    assert computed == [1] * 5
    (whole,) = run([*command, *linear, *places(tmp_path / "other")])
    assert row.confusion == whole.confusion
    capsys.readouterr()
    computed.clear()
    run([*command, "--head=knn", "--recipe.k=3", *places(tmp_path)])
    assert computed == []
    assert "training images at 100 %: 5/5 (cached)" in capsys.readouterr().out
    run([*command, "--head=knn", "--recipe.k=3", *places(tmp_path), "--scales=50"])
    assert sum(computed) == 5


def test_a_stopped_training_of_upernet_resumes(tmp_path, capsys):
    command = [
        TINY, *LAND, *RECIPE, *places(tmp_path), "--head=upernet",
        "--recipe.channels=4", "--recipe.num_steps=4", "--recipe.warmup_steps=1",
    ]  # fmt: skip

    def stop_in_training():
        return "step 1/4" in capsys.readouterr().out

    with pytest.raises(KeyboardInterrupt):
        run(command, stop_in_training)
    assert not (tmp_path / "results.jsonl").exists()
    (row,) = run(command)
    assert "resuming from step 2/4" in capsys.readouterr().out
    assert row.protocol.task == "segment_upernet"
    assert row.feature_scaling == "layer norm per block"
    assert load_head(tmp_path / "out" / row.identity / "head").crop == 16
    assert not list((tmp_path / "cache").rglob("training-*"))


def test_the_head_of_a_fine_tuning_has_the_encoder_that_was_trained(tmp_path):
    make_encoder(tmp_path / "encoder", depth=1)
    command = [
        "xsmae", "segment", f"--encoder={tmp_path / 'encoder'}", *LAND, *RECIPE,
        *places(tmp_path), "--head=upernet", "--nofreeze", "--nocontrols",
        "--recipe.channels=4", "--recipe.num_steps=3", "--recipe.warmup_steps=0",
        "--recipe.learning_rate=0.01",
    ]  # fmt: skip
    assert cli.main(command) == 0
    (row,) = read(tmp_path / "results.jsonl")
    assert row.protocol.task == "segment_upernet_trained"
    assert row.protocol.options["encoder"] == "trained"
    before = xsmae.load_encoder(tmp_path / "encoder")
    head = load_head(tmp_path / "out" / row.identity / "head")
    assert head.encoder.digest != before.digest == row.encoder["digest"]
    assert head.encoder.info["run"]["trained_with_head"] == "upernet"
    changed = {
        path: np.abs(new - old).max()
        for (path, old), new in zip(
            leaves(before.network).items(),
            leaves(head.encoder.network).values(),
            strict=True,
        )
    }
    kernels = {path: by for path, by in changed.items() if path[-1] == "kernel"}
    assert len(kernels) >= 5
    assert min(kernels.values()) > 1e-3
    # What is measured is what is saved.
    test = xsmae.open_source("synthetic_land", num_images=3, seed=1, size=32)
    predicted = list(
        guesses(
            head.predict,
            test,
            normalize=lambda image: image,
            recipe={"crop": 16, "overlap": 4, "batch_size": 4},
        )
    )
    found = sum(confusion(g.mask, g.predicted, 7) for g in predicted)
    assert np.abs(found - row.confusion).sum() <= 8  # ties between two classes
    examples = read_kept(tmp_path / "out" / row.identity).examples
    for index, (step, shown) in examples.items():
        whole = np.concatenate([g.predicted for g in predicted if g.image == index])
        assert (whole[::step, ::step] == shown).mean() > 0.99


def test_the_recipe_follows_the_head_and_the_encoder():
    for name in HEADS:
        assert recipe_of(name, True).crop == 512
    trained = Head("upernet", False, recipe_of("upernet", False).to_dict())
    assert trained.task == "segment_upernet_trained"
    assert trained.describe()["layer_decay"] == 0.9
    assert "layer_decay" not in recipe_of("upernet", True)
    with pytest.raises(UserError, match="head='mlp', expected one of linear, knn"):
        recipe_of("mlp", True)


def test_predictions_at_half_size_are_compared_with_whole_masks():
    mask = np.kron(np.arange(15).reshape(3, 5) % 3, np.ones((8, 8))).astype(np.uint8)
    mask[0, :8] = IGNORE
    source = [Labelled(np.float32(mask)[..., None], mask, gsd=(1.0, 2.0))]
    half = Scaled(source, 50, whole_masks=True)
    assert half[0].image.shape == (12, 20, 1)
    assert half[0].mask is mask
    np.testing.assert_array_equal(half[0].gsd, (2, 4))
    np.testing.assert_array_equal(Scaled(source, 50, gsd="fixed")[0].gsd, (1, 2))

    def predict(images, gsd):
        return np.abs(images - np.arange(3)) * -1.0

    found = guesses(
        predict,
        half,
        normalize=lambda x: x,
        recipe=dict(crop=8, overlap=2, batch_size=2),
    )
    counts = sum(confusion(g.mask, g.predicted, 3) for g in found)
    assert counts.sum() == (mask != IGNORE).sum()
    assert np.trace(counts) / counts.sum() > 0.99


def test_training_masks_take_the_nearest_pixel_and_pixels_without_value_nothing():
    labelled = ramp(10, 12)
    labelled.valid = np.ones((10, 12), bool)
    labelled.valid[:, 6:] = False
    found = Scaled([labelled], 50)[0]
    assert found.image.shape[:2] == found.mask.shape == (5, 6)
    np.testing.assert_array_equal(found.mask[:, :3], [[1, 3, 5]] * 5)
    assert (found.mask[:, 3:] == IGNORE).all()
    np.testing.assert_allclose(found.image[0, :3, 1], [0.5, 2.5, 4.5])
    assert Scaled([labelled], 100)[0] is labelled


# Refusals.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two small data sets: all pixels ignored in `empty`, other classes in `other`."""
    root = tmp_path_factory.mktemp("pictures")
    for name, classes, value in (
        ("good", "ab", 0), ("other", "ac", 0), ("empty", "ab", 255), ("one", "a", 0),
    ):  # fmt: skip
        for kind in ("images", "masks"):
            (root / name / kind).mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(
            root / name / f"images/{name}.png"
        )
        Image.fromarray(np.full((32, 32), value, np.uint8)).save(
            root / name / f"masks/{name}.png"
        )
        content = {"classes": [{"name": c} for c in classes]}
        (root / name / "classes.json").write_text(json.dumps(content))
    return root


def parts(root, train, test):
    return [
        "--data=segmentation", "--data.gsd=1", "--train.split=all", "--test.split=all",
        f"--train.root={root / train}", f"--test.root={root / test}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("good", "other", "classes a, b, the test part a, c"),
        ("good", "empty", "no pixel of the test part counts"),
        ("empty", "good", "no pixel of the train part counts"),
        ("good", "good", "1 images are in both"),
        ("one", "one", "1 class, expected 2"),
    ],
)
def test_parts_that_do_not_fit(train, test, said, pictures, tmp_path):
    with pytest.raises(UserError, match=said):
        run([TINY, *parts(pictures, train, test), *RECIPE, *places(tmp_path)])
    assert not (tmp_path / "results.jsonl").exists()


def test_a_mask_that_cannot_be_used_is_named(pictures, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.json").write_text((pictures / "good/classes.json").read_text())
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images/x.png")
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "masks/x.png")
    with pytest.raises(UserError, match=r"1 of 1 images of the test part .*x.png.* 7"):
        run([TINY, *parts(pictures, "good", tmp_path), *RECIPE, *places(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data=synthetic_land", "--train.source=synthetic"], "has no masks"),
        ([*LAND, "--recipe.crop=18"], r"recipe.crop=18 .* 4 px: .*crop=16"),
        ([*LAND, "--encoder=statistics", "--head=knn"], "encoder=statistics .*=knn"),
        ([*LAND, "--encoder=thumbnail"], "encoder=thumbnail"),
        ([*LAND, "--nofreeze"], "--head=linear reads a frozen"),
        ([*LAND, "--base_size=64"], "--base_size has no meaning"),
        ([*LAND, "--feature=cls"], "--feature has no meaning"),
        ([*LAND, "--batch_size=2"], "--recipe.batch_size"),
        ([*LAND, "--scales=0"], "scales=0, expected"),
        ([*LAND, "--scales=50,50"], "scales=50,50, expected"),
        ([*LAND, "--scales=half"], "scales=half, expected"),
        ([*LAND, "--recipe.k=3"], "recipe.k"),
        ([*LAND, "--recipe.overlap=16"], "recipe.overlap=16, expected"),
        ([*LAND, "--seed=-1"], "seed=-1"),
    ],
)
def test_refusals(arguments, said, tmp_path):
    given = any(argument.startswith("--encoder=") for argument in arguments)
    encoder = [] if given else [TINY]
    with pytest.raises(UserError, match=said):
        run([*encoder, *RECIPE, *places(tmp_path), *arguments])
    assert not (tmp_path / "results.jsonl").exists()


def test_bands_that_do_not_fit_are_refused(tmp_path):
    make_encoder(tmp_path / "nir", bands=("red", "green", "blue", "nir"))
    command = [f"--encoder={tmp_path / 'nir'}", *LAND, *RECIPE, *places(tmp_path)]
    with pytest.raises(UserError, match=r"red, green, blue, nir.*--missing_bands=mean"):
        run(command)
