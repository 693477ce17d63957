"""Classifiers trained on crops: results, learning, resuming."""

import dataclasses
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.encoders import counting_encoder, tiny_encoder
from tests.support.measurements import job
from tests.support.sources import Fingerprinted, Permuted
from xsmae.cli import finetune, results
from xsmae.cli import probe as linear_probe
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.evaluation.fitting.fit import forget, of_trained, state_folder
from xsmae.evaluation.measure import measure
from xsmae.evaluation.rows import read
from xsmae.evaluation.scales import create_scales
from xsmae.evaluation.tasks import finetune as finetuning
from xsmae.evaluation.tasks import published_probe
from xsmae.weights.encoder import Encoder

ROOT = Path(__file__).parent.parent


# Whole trainings


def fields_of(new, **changes):
    fields = new()
    fields.update(batch_size=10, epochs=12.0, warmup_epochs=1.0, **changes)
    return fields.to_dict()


PROBE = fields_of(recipe.published_probe, learning_rate=5.0, trust_coefficient=0.1)
FINETUNE = fields_of(recipe.finetuning, learning_rate=0.05)


def training(tmp_path, *, test=None, kind="probe", scores=None, calls=None, **changes):
    """A measurement that trains; appends the test scores to `scores`."""
    create, fields, encoder, feature, base = {
        "probe": (
            published_probe.create_learner, PROBE,
            counting_encoder([] if calls is None else calls), "cls", 12,
        ),
        "finetune": (
            finetuning.create_learner, FINETUNE, tiny_encoder(), "mean", 8,
        ),
    }[kind]  # fmt: skip

    def create_learner(job, feature, plan):
        learner = create(job, feature, plan, recipe=fields)

        def predict(state, images, gsd):
            found = learner.predict(state, images, gsd)
            scores.append(np.asarray(found))
            return found

        return dataclasses.replace(learner, predict=predict)

    scores = [] if scores is None else scores
    outcomes = functools.partial(
        of_trained, create_learner=create_learner, recipe=fields
    )
    patch = encoder.patch_size
    return job(
        tmp_path,
        Fingerprinted(15, seed=1) if test is None else test,
        **{
            "encoder": encoder,
            "features": [feature],
            "scales": create_scales([100], base=base, patch_size=patch),
            "outcomes": outcomes,
            "batch_size": 8,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """For each kind: the measurement, its rows and its test scores, cached."""

    @functools.cache
    def make(kind):
        scores = []
        this = training(tmp_path_factory.mktemp(kind), kind=kind, scores=scores)
        return this, measure(this), np.concatenate(scores)[:15]

    return make


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_a_stopped_training_ends_as_the_other_bit_for_bit(
    tmp_path, kind, uninterrupted
):
    scores, said, asked = [], [], []

    def should_stop():
        asked.append(None)
        return len(asked) in {"probe": (12, 19, 31), "finetune": (22,)}[kind]

    stops = 0
    while True:
        this = training(
            tmp_path, kind=kind, scores=scores, should_stop=should_stop,
            say=said.append,
        )  # fmt: skip
        try:
            rows = measure(this)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == (3 if kind == "probe" else 1)
    assert sum("from step" in line for line in said) == stops
    _, expected, expected_scores = uninterrupted(kind)
    np.testing.assert_array_equal(np.concatenate(scores)[:15], expected_scores)
    assert comparable(rows) == comparable(expected)


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_it_learns_what_is_easy(kind, uninterrupted):
    this, (row,), _ = uninterrupted(kind)
    assert row.value >= 0.9
    assert row.num_train == 30
    assert row.num_test == 15
    assert row.feature_scaling == {
        "probe": "batch norm", "finetune": "layer norm (fc_norm)",
    }[kind]  # fmt: skip
    assert np.sum(row.confusion) == 15
    folder = state_folder(this, this.scales[0], this.features[0])
    assert folder.is_dir()
    forget(this)
    assert not folder.exists()


def test_labels_of_the_test_images_reach_no_training(tmp_path, uninterrupted):
    scores = []
    (row,) = measure(training(tmp_path, test=Permuted(15, seed=1), scores=scores))
    _, (other,), expected = uninterrupted("probe")
    np.testing.assert_array_equal(np.concatenate(scores)[:15], expected)
    assert row.value <= 0.1
    assert other.value >= 0.9


def test_the_encoder_is_told_the_gsd_of_each_crop(tmp_path):
    """Images of 12 x 16 px with a GSD of 1 + index metres; the crop scales it."""
    calls = []
    measure(training(tmp_path, calls=calls))
    told = np.concatenate(calls)
    crops = told[1 : 1 + 8]  # after the blank image that measures the width
    assert len(np.unique(crops[:, 0])) == 8
    # A crop has at least 8% of the area and a ratio up to 4/3.
    low, high = np.sqrt(0.08 * 192 * 3 / 4) / 12, 16 / 12
    everything = told[1:-16]
    assert (everything >= low - 1e-6).all()
    assert (everything <= high * 30 + 1e-6).all()
    assert (everything[:, 0] != everything[:, 1]).mean() > 0.9


def test_an_unusable_image_is_left_out(tmp_path):
    parts = dataclasses.replace(
        training(tmp_path).parts, train=Fingerprinted(30, bad=[3, 7])
    )
    (row,) = measure(training(tmp_path, parts=parts))
    assert row.num_train == 28
    assert row.unusable == {"train": 2, "test": 0}


def test_a_damaged_state_is_begun_anew(tmp_path, uninterrupted):
    this = training(tmp_path)
    measure(this)
    (tmp_path / "results.jsonl").unlink()
    folder = state_folder(this, this.scales[0], "cls")
    for file in folder.rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(b"")
    said = []
    again = measure(training(tmp_path, say=said.append))
    assert any(
        re.search(r"is damaged \(.+\): this training starts again", line)
        for line in said
    )
    assert comparable(again) == comparable(uninterrupted("probe")[1])


def test_a_loss_that_is_not_finite_is_told(tmp_path, monkeypatch):
    this = training(tmp_path)
    broken = dataclasses.replace(
        this.encoder,
        encode=lambda images, gsd: {"cls": np.full((len(images), 2), np.nan)},
    )
    said = r"the loss is nan at step 1: lower --recipe.learning_rate"
    with pytest.raises(UserError, match=said):
        measure(dataclasses.replace(this, encoder=broken))


def comparable(rows):
    """Rows without time and speed."""
    left_out = dict.fromkeys(("run", "seconds", "images_per_second"))
    return [dataclasses.replace(row, **left_out) for row in rows]


# The binaries

DATA = [
    "--data=configs/quickstart.py",
    "--data.size=32",
    "--train.num_images=40",
    "--test.num_images=20",
    "--recipe.batch_size=8",
    "--recipe.warmup_epochs=1",
]
BINARIES = {
    "probe": [
        "--encoder=statistics", "--protocol=published", "--recipe.epochs=40",
    ],
    "finetune": [
        "--encoder=random:tiny,embed_dim=16,depth=2,num_heads=2,patch_size=8",
        "--recipe.epochs=30",
        # Slow to compile; the test above resumes with them.
        "--recipe.mixup=0",
        "--recipe.cutmix=0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BINARIES)
def test_killed_binaries_end_with_the_row_of_the_uninterrupted(
    name, tmp_path, monkeypatch, capsys
):
    """SIGKILL once, SIGTERM once: the same row, and no files left behind."""
    arguments = [*BINARIES[name], *DATA]
    main = {"probe": linear_probe, "finetune": finetune}[name].main
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    monkeypatch.chdir(killed)
    for saved, number in ((1, signal.SIGKILL), (20, signal.SIGTERM)):
        process = subprocess.Popen(
            [sys.executable, "-m", "xsmae", name, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while newest(killed) < saved:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.random() / 5)
        process.send_signal(number)
        expected = -9 if number == signal.SIGKILL else 143
        assert process.wait(60) == expected
        assert not (killed / "results.jsonl").exists()
    capsys.readouterr()
    assert main(["xsmae", *arguments]) == 0
    assert "from step" in capsys.readouterr().out
    assert not list(killed.rglob("training-*"))
    monkeypatch.chdir(whole)
    assert main(["xsmae", *arguments]) == 0
    found, expected = (read(folder / "results.jsonl") for folder in (killed, whole))
    assert comparable(found) == comparable(expected)
    options = found[0].protocol.options
    assert options["epochs"] == {"probe": 40.0, "finetune": 30.0}[name]
    task = {"probe": "linear_probe_published", "finetune": "finetune"}[name]
    assert {row.protocol.task for row in found} == {task}
    # Existing rows are not computed again, and can be drawn.
    capsys.readouterr()
    assert main(["xsmae", *arguments]) == 0
    assert "epoch" not in capsys.readouterr().out
    assert len(read(whole / "results.jsonl")) == len(expected)
    assert results.main(["xsmae", "results.jsonl", "--out=report"]) == 0
    report = (whole / "report" / "results.md").read_text()
    assert f"{task}: classifier=" in report
    assert "batch_size=8" in report


def newest(folder):
    """The newest saved step of any training."""
    places = folder.glob(".cache/xsmae/features/*/training-*")
    names = [name for place in places for name in os.listdir(place)]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def test_a_row_for_the_encoder_and_one_for_its_control(tmp_path, monkeypatch):
    """An exported encoder gets a random control of the same architecture."""
    Encoder.random(tiny_encoder().info, seed=5).save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    short = ["--recipe.epochs=1", "--recipe.warmup_epochs=0", "--encoder=mine"]
    short = ["xsmae", *DATA, *short, "--recipe.mixup=0", "--recipe.cutmix=0"]
    assert finetune.main([*short, "--controls=false"]) == 0
    assert [row.encoder["kind"] for row in read(Path("results.jsonl"))] == ["encoder"]
    assert finetune.main(short) == 0
    rows = read(Path("results.jsonl"))
    assert [row.encoder["kind"] for row in rows] == ["encoder", "random"]
    assert {row.feature for row in rows} == {"mean"}


def test_a_classifier_for_each_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--encoder=statistics", "--protocol=published", "--scales=50,100"]
    assert linear_probe.main(["xsmae", *DATA, *flags, "--recipe.epochs=2"]) == 0
    rows = read(Path("results.jsonl"))
    places = [50.0, 100.0, "average"]
    assert [(row.encoder["kind"], row.scale) for row in rows] == [
        (kind, place) for kind in ("statistics", "thumbnail") for place in places
    ]
