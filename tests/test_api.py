"""The public API: its names, its imports, and its use from an empty folder."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from xsmae.configs import common

import xsmae
from tests.test_main import SMALL_MODEL
from xsmae.errors import UserError
from xsmae.evaluation.evaluate import subject_of
from xsmae.evaluation.subjects import open_encoder
from xsmae.evaluation.tasks.catalogue import create_task
from xsmae.process.signals import StopRequest
from xsmae.weights.encoder import Encoder

NAMES = {
    "embed", "Encoder", "evaluate", "export", "import_weights", "load_config",
    "load_encoder", "load_head", "map_embeddings", "map_scene", "open_raster",
    "open_source", "pretrain", "read_results", "search", "segment",
}  # fmt: skip


def run(code, folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_listed_and_there():
    assert set(xsmae.__all__) == NAMES
    assert set(dir(xsmae)) >= NAMES
    for name in NAMES:
        assert callable(getattr(xsmae, name)), name
    with pytest.raises(AttributeError, match="pretrian"):
        _ = xsmae.pretrian


def test_importing_it_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, json; before = set(sys.modules); import xsmae; dir(xsmae); "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    imported = json.loads(run(code, tmp_path))
    heavy = {"jax", "flax", "numpy", "absl", "ml_collections", "PIL", "orbax"}
    assert not heavy & {name.partition(".")[0] for name in imported}
    # It imports none of our own modules either.
    assert [name for name in imported if name.startswith("xsmae.")] == []


SMALL = {
    **dict(flag.removeprefix("--config.").split("=") for flag in SMALL_MODEL),
    "batch_size": 8,
    "num_steps": 2,
    "optim.warmup_steps": 1,
    "tensorboard": False,
    "knn.every": -1,
}
USE = """
import json, sys
import numpy as np
import xsmae

data = {"data.root": sys.argv[1], "data.gsd": 0.5, "data.test_fraction": 0.25}
config = xsmae.load_config("folder:size=tiny", data | json.loads(sys.argv[2]))
workdir = xsmae.pretrain(config, "runs/mine")
encoder = xsmae.load_encoder(workdir)
train, test = (xsmae.open_source(config, split=part) for part in ("train", "test"))
features = encoder(np.stack([test[i].image for i in range(len(test))]), gsd=0.5)
rows = xsmae.evaluate(encoder, train, test, task="knn", k=3, results="rows.jsonl")
assert xsmae.read_results("rows.jsonl") == rows
xsmae.export(encoder, "timm", format="timm", gsd=0.5)
print(json.dumps([features.shape, [r.encoder["kind"] for r in rows]]))
"""


def test_ten_lines_from_an_empty_folder(image_folder, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    printed = run(USE, folder, image_folder, json.dumps(SMALL))
    (count, _), kinds = json.loads(printed.splitlines()[-1])
    assert count == 6
    # Two features each from the encoder and its random control, and two from pixels.
    assert kinds == ["encoder"] * 2 + ["random"] * 2 + ["statistics", "thumbnail"]
    assert {path.name for path in folder.iterdir()} == {"runs", "rows.jsonl", "timm"}


# An encoder


@pytest.fixture
def exported(tmp_path):
    """A folder with a small untrained encoder."""
    config = common.get_common("corrected", "tiny")
    config.model.update(embed_dim=16, depth=1, num_heads=2, patch_size=4)
    info = {
        "architecture": config.model.to_dict(),
        "image_size": 16,
        **{name: config[name] for name in ("bands", "mean", "std")},
    }
    Encoder.random(info, seed=3).save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoder_in_memory_is_that_of_its_folder(exported):
    config = common.get_common("corrected", "tiny")
    there = open_encoder(str(exported), config=config)
    here = subject_of(xsmae.load_encoder(exported))
    assert here.digest == there.digest
    assert here.kind == "encoder"
    assert "path" not in here.origin
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    gsd = np.ones((2, 2), np.float32)
    for name, feature in there.encode(images, gsd).items():
        np.testing.assert_array_equal(here.encode(images, gsd)[name], feature)


def test_what_is_no_encoder_is_refused():
    with pytest.raises(UserError, match="encoder=3, expected"):
        subject_of(3)


@pytest.fixture
def official(tmp_path):
    """The weights of a small MAE encoder under the official names, and the encoder."""
    config = common.get_common("published", "tiny", "mae")
    config.model.update(embed_dim=16, depth=1, num_heads=2, patch_size=4)
    info = {
        "architecture": config.model.to_dict(),
        "image_size": 16,
        **{name: config[name] for name in ("bands", "mean", "std")},
    }
    Encoder.random(info, seed=5).save(tmp_path / "plain")
    encoder = xsmae.load_encoder(tmp_path / "plain")
    notes = xsmae.export(encoder, tmp_path / "timm", format="timm")
    assert any("16 px" in note for note in notes)
    return tmp_path / "timm" / "model.safetensors", encoder


@pytest.mark.parametrize("out", [None, "imported"])
def test_weights_come_back_from_other_frameworks(official, out, tmp_path):
    file, expected = official
    place = out and tmp_path / out
    found = xsmae.import_weights(file, out=place, num_heads=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(found(images), expected(images), rtol=1e-5, atol=1e-6)
    if place:
        assert (place / "encoder" / "encoder.json").exists()
        with pytest.raises(UserError, match=f"{place} exists"):
            xsmae.import_weights(file, out=place, num_heads=2)


def test_statistics_of_imported_weights_can_be_given(official):
    file, _ = official
    mean = (0.1, 0.2, 0.3)
    found = xsmae.import_weights(file, num_heads=2, mean=mean)
    assert tuple(found.info["mean"]) == mean
    with pytest.raises(UserError, match="--mean has 1, expected 3"):
        xsmae.import_weights(file, num_heads=2, mean=[0.5])


# Sources


def test_a_source_by_name_by_fields_and_of_a_config(image_folder):
    fields = {"root": str(image_folder), "gsd": 0.5}
    config = xsmae.load_config("folder", {f"data.{k}": v for k, v in fields.items()})
    expected = xsmae.open_source("folder", **fields).fingerprint
    assert xsmae.open_source(config).fingerprint == expected
    assert xsmae.open_source(config.data).fingerprint == expected
    named = {"source": "folder", **fields}
    assert xsmae.open_source(named).fingerprint == expected
    test = xsmae.open_source(config, split="test", test_fraction=0.25)
    assert len(test) == 6


@pytest.mark.parametrize(
    ("data", "fields", "said"),
    [
        ("nothing", {}, "data.source='nothing', expected one of csv,"),
        ("folder", {"gsd": 1.0}, r"data.root not set: .* with root="),
        ("folder", {"metres": 1}, r"source folder has no .*metres, .*root, gsd"),
        ({"root": "images"}, {}, "names no source"),
    ],
)
def test_a_source_that_cannot_be_opened(data, fields, said):
    with pytest.raises(UserError, match=said):
        xsmae.open_source(data, **fields)


# Evaluations


@pytest.fixture
def world():
    """Fields for training and test images of the built-in world."""
    fields = {"source": "synthetic", "size": 32, "gsd": 1.0}
    train, test = ((40, 0), (20, 1))
    return [{**fields, "num_images": n, "seed": seed} for n, seed in (train, test)]


def rows_of(*arguments, **options):
    rows = xsmae.evaluate(*arguments, progress=False, **options)
    return [
        dataclasses.replace(r, run={}, seconds=0, images_per_second=0) for r in rows
    ]


def test_fields_and_their_sources_give_the_same_rows(world, tmp_path, capsys):
    options = {"k": 3, "scales": (50, 100), "controls": False}
    rows = rows_of("statistics", *world, **options)
    assert [row.scale for row in rows] == [50.0, 100.0, "average"]
    assert rows[0].protocol.data["name"] == "synthetic"
    sources = [xsmae.open_source(fields) for fields in world]
    named = rows_of("statistics", *sources, **options, data_name="synthetic")
    assert named == rows
    assert capsys.readouterr().out == ""
    # Cached features change nothing and are not computed again.
    kept = {"results": tmp_path / "rows.jsonl", "cache": tmp_path / "features"}
    for _ in range(2):
        assert rows_of("statistics", *world, **options, **kept) == rows
    assert len(xsmae.read_results(tmp_path / "rows.jsonl")) == len(rows)


RECIPE = {"batch_size": 10, "epochs": 1, "warmup_epochs": 0, "crop_area": (0.5, 1)}


@pytest.mark.parametrize("task", ["linear_probe_published", "finetune"])
def test_a_recipe_is_what_differs(task):
    found, default = (create_task(task, recipe=r).options for r in (RECIPE, None))
    assert (found["epochs"], found["crop_area"]) == (1.0, [0.5, 1])
    assert {name for name in found if found[name] != default[name]} == RECIPE.keys()


def test_a_trained_classifier(world, exported):
    described = exported / "encoder.json"
    info = {**json.loads(described.read_text()), "gsd_range": [0.1, 10.0]}
    described.write_text(json.dumps(info))
    options = {"task": "linear_probe_published", "recipe": RECIPE, "controls": False}
    (row,) = rows_of(exported, *world, **options)
    assert (row.protocol.task, row.feature) == ("linear_probe_published", "cls")
    assert row.encoder["name"] == exported.parent.name
    assert row.encoder["gsd_range"] == [0.1, 10.0]
    assert row.protocol.options["epochs"] == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "votes"}, "task='votes', expected one of knn, .*linear_probe"),
        (
            {"penalties": [1]},
            "task=knn has no option penalties, expected some of k, temp",
        ),
        ({"task": create_task("knn"), "k": 3}, "options k were given with a Task"),
        ({"k": 41}, "k=41 is more than the 40"),
        ({"task": "finetune", "recipe": {"epoch": 1}}, "recipe.epoch .* epochs"),
        ({"task": "finetune", "recipe": {"epochs": -1}}, "recipe.epochs=-1"),
        ({"task": "finetune", "recipe": {"epochs": "x"}}, "recipe.epochs='x'"),
        ({"task": "finetune"}, "encoder=statistics has no weights"),
        ({"task": "linear_probe", "penalties": []}, "penalties=, "),
        ({"scales": ()}, "expected percent above 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"gsd": "some"}, "gsd=some, expected one of true, fixed"),
    ],
)
def test_what_cannot_be_measured(changes, said, world):
    with pytest.raises(UserError, match=said) as caught:
        xsmae.evaluate("statistics", *world, **changes)
    assert "\n" not in str(caught.value)


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl does not exist"):
        xsmae.read_results(tmp_path / "rows.jsonl")


# Pretraining


def test_a_stopped_run_is_an_interrupt(monkeypatch, tmp_path):
    seen = []

    def stopped(config, workdir):
        seen.append(workdir)
        config.seed = 7
        return 128 + 15

    monkeypatch.setattr("xsmae.train.train_and_evaluate", stopped)
    config = xsmae.load_config("quickstart")
    with pytest.raises(KeyboardInterrupt, match="15"):
        xsmae.pretrain(config, str(tmp_path))
    assert seen == [Path(tmp_path)]
    assert config.seed == 0  # the caller's config does not change


def test_weights_to_start_from_decide_but_for_what_is_kept(monkeypatch, tmp_path):
    saved = {"method": "mae", "model": {"depth": 3, "embed_dim": 24}, "mean": [0.1] * 3}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = []
    monkeypatch.setattr(
        "xsmae.train.train_and_evaluate", lambda config, workdir: found.append(config)
    )
    config = xsmae.load_config("quickstart:method=mae", {"init": tmp_path})
    xsmae.pretrain(config, tmp_path / "run", keep=["mean"])
    assert found[0].model.depth == 3
    assert found[0].model.embed_dim == 24
    assert found[0].mean == config.mean
    assert config.model.depth != 3


def test_a_thread_that_handles_no_signals_can_train():
    found = []

    def enter():
        with StopRequest() as request:
            found.append(request.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None]
