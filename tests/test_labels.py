"""`xsmae predict` with a head that labels whole images: the table, refusals, stops."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.support.encoders import make_encoder
from tests.support.sources import Fingerprinted
from xsmae import cli
from xsmae.data.square import square
from xsmae.errors import UserError
from xsmae.evaluation.labels import write_labels
from xsmae.models.linear import LogisticRegression
from xsmae.weights.classifier import TrainedClassifier, probabilities, save_classifier
from xsmae.weights.encoder import load_encoder
from xsmae.weights.head import load_head

CLASSES = ("field", "roof", "sea")


def make_classifier(folder, **changes):
    """Logistic regression with random weights on a random encoder."""
    encoder = load_encoder(make_encoder(folder / "given", position="gsd", depth=1))
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(16, 3)), rng.normal(size=3)
    model = LogisticRegression(np.zeros(16), np.ones(16), *numbers, penalty=1.0)
    options = {
        "classes": CLASSES, "feature": "mean", "size": 16, "scale": 100.0,
        "gsd_policy": "true", "gsd_factor": 1.0, "training": {},
    }  # fmt: skip
    trained = TrainedClassifier.logistic(model, encoder)
    save_classifier(folder / "head", trained, **options | changes)
    return folder / "head"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("classifier"))


def silent(line):
    pass


def predict(*words):
    return cli.main(["xsmae", "predict", *map(str, words)])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_row_an_image_in_order(head, tmp_path, suffix):
    classifier, source = load_head(head), Fingerprinted(11, bad=[2, 4])
    out = tmp_path / "new" / f"labels.{suffix}"
    found = write_labels(classifier, source, out, batch_size=3, say=silent)
    assert found.images == 9
    assert found.unusable == {f"{i}.png": "no image" for i in (2, 4)}
    if suffix == "csv":
        rows = rows_of(out)
    else:
        table = pa.parquet.read_table(out)
        rows = table.to_pylist()
        told = json.loads(table.schema.metadata[b"xsmae"])
        assert told["head"] == classifier.digest
        assert told["classes"] == list(CLASSES)
        metadata = pa.parquet.read_metadata(out).metadata
        assert json.loads(metadata[b"xsmae.unusable"]) == found.unusable
    shares = [f"p_{name}" for name in CLASSES]
    assert list(rows[0]) == ["id", "label", "probability", *shares, "true_label"]
    used = [i for i in range(11) if i not in (2, 4)]
    assert [row["id"] for row in rows] == [f"{i}.png" for i in used]
    assert [row["true_label"] for row in rows] == [
        source.class_names[i % 3] for i in used
    ]
    for index, row in zip(used, rows, strict=True):
        record = source[index]
        image, gsd = square(record.image, record.gsd, 16)  # 12 x 16 px before
        expected = classifier.predict(image[None], gsd=gsd)[0]
        got = np.array([float(row[name]) for name in shares])
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert row["label"] == CLASSES[got.argmax()]
        assert float(row["probability"]) == got.max()
        assert got.sum() == pytest.approx(1, abs=1e-6)


def test_the_gsd_factor_of_a_fixed_gsd_is_applied(head, tmp_path):
    half = load_head(make_classifier(tmp_path, gsd_factor=0.5, gsd_policy="fixed"))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    whole = load_head(head)
    np.testing.assert_array_equal(half.predict(images, 2.0), whole.predict(images, 1.0))
    assert np.abs(whole.predict(images, 2.0) - whole.predict(images, 1.0)).max() > 0
    assert half.digest != whole.digest


def test_probabilities_of_large_scores():
    found = probabilities(np.float32([[1e4, 0, -1e4], [0, 0, 0]]))
    np.testing.assert_allclose(found, [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)


def test_a_folder_and_its_config_give_the_same_rows(
    head, image_folder, tmp_path, capsys
):
    (image_folder / "roof" / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "labels.csv"
    assert predict(image_folder, "--gsd=0.5", f"--head={head}", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert "left out: roof/broken.jpg: " in printed
    assert f"{out}: 24 images, 1 left out" in printed
    data = ("--data=configs/folder.py", f"--data.root={image_folder}", "--data.gsd=0.5")
    other = tmp_path / "other.csv"
    assert predict(*data, f"--head={head}", f"--out={other}", "--batch_size=64") == 0
    rows = rows_of(out)
    assert rows_of(other) == rows
    assert {row["true_label"] for row in rows} == {"field", "roof"}
    assert {row["id"].partition("/")[0] for row in rows} == {"field", "roof"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FOLDER"], "gsd"),
        (["FOLDER", "FOLDER", "--gsd=1"], "2 folders given"),
        (["FOLDER", "--data=configs/folder.py"], "1 folders and --data"),
        (["--data=configs/folder.py", "--gsd=1"], "--data.gsd"),
        ([], "--data is missing"),
        (["nowhere", "--gsd=1"], "nowhere does not exist"),
        (["SCENE", "--gsd=1"], "scene.tif is a file.*folder of images"),
        (["FOLDER", "--gsd=1", "--probabilities"], "--probabilities is for scenes"),
        (["FOLDER", "--gsd=1", "--bands=a"], "--bands is for scenes"),
        (["FOLDER", "--gsd=1", "--out=labels.txt"], r"labels.txt.*\.csv or \.parquet"),
        (["FOLDER", "--gsd=1", "--out=/dev/null/x.csv"], "cannot write to .*--out"),
    ],
)
def test_labels_that_cannot_be_written(
    words, said, head, image_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scene.tif").write_bytes(b"II*")
    names = {"FOLDER": str(image_folder), "SCENE": "scene.tif"}
    words = [names.get(word, word) for word in words]
    assert predict(*words, f"--head={head}") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert {path.name for path in tmp_path.iterdir()} == {"images", "scene.tif"}


def test_bands_of_other_images_are_refused(head, tmp_path):
    class Infrared(Fingerprinted):
        bands = ("nir", "red", "green")

    with pytest.raises(UserError, match="nir, red, green"):
        write_labels(load_head(head), Infrared(3), tmp_path / "x.csv", say=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_stop_leaves_what_was_there(head, tmp_path, suffix):
    asked, out = [], tmp_path / f"x.{suffix}"
    out.write_text("before")

    def should_stop():
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(KeyboardInterrupt):
        write_labels(
            load_head(head), Fingerprinted(9), out, batch_size=3, say=silent,
            should_stop=should_stop,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "before"


def test_without_labels_there_is_no_column_of_them(head, tmp_path):
    class Unlabelled(Fingerprinted):
        class_names = ()

        def __getitem__(self, index):
            record = super().__getitem__(index)
            return type(record)(record.image, record.gsd, None, "\udcff.png")

        def id(self, index):
            return "\udcff.png"

    out = tmp_path / "x.csv"
    write_labels(load_head(head), Unlabelled(2), out, say=silent)
    (row, _) = rows_of(out)
    assert "true_label" not in row
    assert row["id"] == "\\udcff.png"
