"""Classifiers in folders: kept by evaluations, loaded, damaged."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import xsmae
from tests.support.encoders import make_encoder
from xsmae.data.catalogue import build_source
from xsmae.errors import UserError
from xsmae.evaluation.features import encode_batches
from xsmae.weights.classifier import Classifier
from xsmae.weights.encoder import Encoder

WORLD = {"source": "synthetic", "size": 32, "gsd": 1.0}
TRAIN, TEST = (
    {**WORLD, "num_images": n, "seed": seed} for n, seed in ((40, 0), (20, 1))
)
CROPS = {"batch_size": 10, "epochs": 2, "warmup_epochs": 0}
TASKS = {
    "linear_probe": {"penalties": [1.0], "feature": ("cls", "mean")},
    "linear_probe_published": {"recipe": {**CROPS, "learning_rate": 50.0}},
    "finetune": {
        # Mixing and drop path are slow to compile.
        "recipe": {**CROPS, "learning_rate": 0.01, "mixup": 0, "cutmix": 0,
                   "drop_path": 0.0, "random_erasing": 0.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """task -> its folder and its rows, measured once."""

    @functools.cache
    def measure(task):
        folder = tmp_path_factory.mktemp(task)
        make_encoder(folder / "encoder", position="gsd", depth=1)
        options = {
            "task": task, "results": folder / "rows.jsonl", "out": folder / "heads",
            "cache": folder / "cache", "progress": False, "scales": (50, 100),
            "gsd": "fixed", "controls": task == "linear_probe", **TASKS[task],
        }  # fmt: skip
        call = functools.partial(
            xsmae.evaluate, folder / "encoder", TRAIN, TEST, **options
        )
        return SimpleNamespace(folder=folder, call=call, rows=call())

    return measure


def predicted(head, source):
    """The probabilities for all images, resized as in the evaluation."""
    batches = encode_batches(
        lambda images, gsd: {"found": head.predict(images, gsd=gsd)},
        source,
        np.arange(len(source)),
        size=head.size,
        batch_size=8,
    )
    return np.concatenate([found["found"] for _, found in batches])


@pytest.mark.parametrize("task", TASKS)
def test_a_kept_classifier_gives_the_accuracy_of_its_row(measured, task):
    folder, rows = measured(task).folder, measured(task).rows
    test = build_source(TEST)
    kept = [row for row in rows if row.files]
    assert len(kept) == (4 if task == "linear_probe" else 2)
    assert {row.encoder["kind"] for row in kept} == {"encoder"}
    assert {row.scale for row in kept} == {50.0, 100.0}
    assert {path.name for path in (folder / "heads").iterdir()} == {
        row.identity for row in kept
    }
    for row in kept:
        head = xsmae.load_head(f"{row.files}/head")
        assert isinstance(head, Classifier)
        assert (head.size, head.feature) == (row.size, row.feature)
        assert head.classes == test.class_names
        found = predicted(head, test)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
        assert (found.argmax(axis=1) == test.labels).mean() == row.value
        confusion = np.zeros((len(head.classes),) * 2, int)
        np.add.at(confusion, (test.labels, found.argmax(axis=1)), 1)
        assert confusion.tolist() == row.confusion
        told = head.info["training"]
        assert told["protocol"] == row.protocol.key
        assert told["options"] == row.protocol.options
        assert told["digest"] == row.encoder["digest"]
        assert head.info["gsd_policy"] == "fixed"
        assert head.info["gsd_factor"] == row.scale / 100
        # The fine-tuned encoder is the one that is saved.
        same = head.encoder.digest == row.encoder["digest"]
        assert same == (task != "finetune")
    # Heads of a frozen encoder share its file.
    inodes = {
        (folder / "heads" / row.identity / "head/encoder/encoder.safetensors")
        .stat()
        .st_ino
        for row in kept
    }
    assert len(inodes) == (len(kept) if task == "finetune" else 1)
    # The folder of the row will do.
    assert xsmae.load_head(kept[0].files).digest != xsmae.load_head(row.files).digest


def test_rows_that_exist_and_their_heads_are_not_written_again(measured):
    this = measured("linear_probe")
    files = [path for path in (this.folder / "heads").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    lines = (this.folder / "rows.jsonl").read_text()
    again = {row.identity: row.files for row in this.call()}
    assert again == {row.identity: row.files for row in this.rows}
    # Without the average and one row, only the head of that row is new.
    kept = [line for line in lines.splitlines(True) if '"scale": "average"' not in line]
    lost = json.loads(kept[0])["files"]
    (this.folder / "rows.jsonl").write_text("".join(kept[1:]))
    this.call()
    after = {path: path.stat().st_mtime_ns for path in files}
    changed = {path for path in files if after[path] != before[path]}
    heads = {path.relative_to(this.folder / "heads").parts[0] for path in changed}
    assert heads == {Path(lost).name}
    (this.folder / "rows.jsonl").write_text(lines)


def test_a_row_of_before_heads_were_kept_is_found(measured, tmp_path):
    this = measured("linear_probe_published")
    text = (this.folder / "rows.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    text = "".join(json.dumps(line | {"files": None}) + "\n" for line in lines)
    (tmp_path / "rows.jsonl").write_text(text)
    rows = this.call(results=tmp_path / "rows.jsonl", out=tmp_path / "heads")
    assert [row.identity for row in rows] == [row.identity for row in this.rows]
    assert (tmp_path / "rows.jsonl").read_text() == text
    assert not list((tmp_path / "heads").iterdir())


def test_without_a_folder_no_head_is_kept(tmp_path):
    (row,) = xsmae.evaluate(
        make_encoder(tmp_path / "encoder", depth=1), TRAIN, TEST, task="linear_probe",
        penalties=[1.0], feature="cls", controls=False, progress=False,
    )  # fmt: skip
    assert row.files is None
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    encoder = Encoder.random(
        xsmae.load_encoder(make_encoder(tmp_path / "encoder", depth=1)).info, seed=0
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file.*--out"):
        xsmae.evaluate(
            encoder, TRAIN, TEST, task="finetune", out=tmp_path / "file",
            progress=False,
        )  # fmt: skip


@pytest.fixture
def copy(measured, tmp_path):
    row = next(row for row in measured("linear_probe").rows if row.files)
    return shutil.copytree(f"{row.files}/head", tmp_path / "head")


def change(folder, **fields):
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_images_that_it_cannot_read_are_refused(copy):
    head, images = xsmae.load_head(copy), np.zeros((1, 16, 16, 3), np.uint8)
    for wrong, gsd, said in (
        (images[..., :2], 1.0, "red, green, blue"),
        (images[:, :15], 1.0, "15x16"),
        (images, None, "gsd"),
        (images, -1.0, "gsd=-1"),
    ):
        with pytest.raises(UserError, match=said):
            head.predict(wrong, gsd=gsd)


CHANGES = {
    "schema": 2, "task": "knn", "kind": "forest", "classes": [], "feature": "max",
    "size": 1.5, "gsd_factor": 0, "architecture": {"dtype": "int8"},
    "encoder": "0" * 16, "weights": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_other_descriptions_of_classifiers_are_refused_by_name(copy, name):
    change(copy, **{name: CHANGES[name]})
    match = {"architecture": "inconsistent", "weights": "head.safetensors"}
    with pytest.raises(UserError, match=match.get(name, name)) as caught:
        xsmae.load_head(copy)
    assert "\n" not in str(caught.value)


def test_damaged_files_of_classifiers_are_refused_by_name(copy):
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for damaged in (None, b"", content[: len(content) // 2]):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                xsmae.load_head(copy)
            assert str(copy) in str(caught.value)
            path.write_bytes(content)
    change(copy, classes=[{"name": "a"}, {"name": "b"}])
    with pytest.raises(UserError, match=r"\(2,\), found \(\d+,\)"):
        xsmae.load_head(copy)
