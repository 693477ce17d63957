"""The model card: front matter, numbers of encoder.json, escaping, edited files."""

import json

import pytest
import yaml

import xsmae
from tests.support.encoders import make_encoder
from tests.support.runs import SMALL_RUN, call
from xsmae.evaluation.intervals import bootstrap_interval
from xsmae.process.files import read_jsonl
from xsmae.weights.export import export
from xsmae.weights.model_card import LIBRARIES, card, write_card

KNN = {
    "k": 20,
    "temperature": 0.07,
    "size": 16,
    "step": 8,
    "train_images": 30,
    "test_images": 20,
    "classes": ["annual_crop", "a|b", "*lake*\n<b>"],
    "interval": "95 % percentile bootstrap over the test images",
    "accuracy": {
        "accuracy_mean": [0.75, 0.55, 0.9],
        "random_encoder_mean": [0.5],
        "image_statistics": [0.65, 0.45, 0.85],
    },
}


@pytest.fixture
def info(tmp_path):
    return xsmae.load_encoder(make_encoder(tmp_path / "source")).info


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a finished run with a kNN monitor."""
    workdir = tmp_path_factory.mktemp("card") / "run"
    quickstart = "--config=configs/quickstart.py:corrected"
    assert call(quickstart, *SMALL_RUN, f"--workdir={workdir}") == 0
    return workdir


def parts(text):
    """The front matter, parsed, and the body."""
    empty, front, body = text.split("---\n", 2)
    assert not empty
    return yaml.safe_load(front), body


def cells(body):
    """The first cell of each row in a table -> its other cells."""
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_a_run_writes_its_card(run):
    info = json.loads((run / "encoder" / "encoder.json").read_text())
    front, body = parts((run / "encoder" / "README.md").read_text())
    assert front == {
        "library_name": "xsmae",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "remote-sensing", "earth-observation", "self-supervised", "vit",
            "cross-scale-mae",
        ],
        "metrics": ["accuracy"],
    }  # fmt: skip
    table = cells(body)
    assert table["mean per band"] == [", ".join(map(str, info["mean"]))]
    assert table["bands, in order"] == ["red, green, blue"]
    assert table["image size in training"] == [f"{info['image_size']} px"]
    low, high = info["gsd_range"]
    assert table["GSD in training"] == [f"{low:.4g} to {high:.4g} m per pixel"]
    assert table["images"] == ["30"]
    assert table["fingerprint of the images"] == [info["run"]["fingerprint"]]
    assert table["licence of the data"] == ["not stated"]
    for name, value in info["run"]["recipe"].items():
        assert f"\n{name} = {json.dumps(value)}\n" in body
    assert info["run"]["recipe"]["learning_rate"] == 0.004 * 8 / 256
    assert info["run"]["recipe"]["model.mask_ratio"] == 0.75


def test_the_results_are_those_of_the_run(run):
    info = json.loads((run / "encoder" / "encoder.json").read_text())
    (row,) = (
        row
        for row in read_jsonl(run / "metrics.jsonl")
        if "knn_full/accuracy_cls" in row
    )
    measured = {
        name.removeprefix("knn_full/"): value
        for name, value in row.items()
        if name.startswith("knn_full/")
    }
    knn = info["run"]["knn"]
    assert {name: values[0] for name, values in knn["accuracy"].items()} == measured
    assert (knn["step"], knn["train_images"], knn["test_images"]) == (8, 30, 20)
    right = round(measured["accuracy_mean"] * 20)
    scores = [1.0] * right + [0.0] * (20 - right)
    expected = list(bootstrap_interval(scores, seed=0))
    assert knn["accuracy"]["accuracy_mean"][1:] == expected
    body = (run / "encoder" / "README.md").read_text()
    shares = [100 * value for value in knn["accuracy"]["accuracy_mean"]]
    assert r"{:.1f} \[{:.1f}, {:.1f}\]".format(*shares) in body


def test_the_card_changes_no_digest(run):
    encoder = xsmae.load_encoder(run)
    less = {k: v for k, v in encoder.info.items() if k != "run"}
    (run / "encoder" / "encoder.json").write_text(json.dumps(less | {"run": {}}))
    try:
        assert xsmae.load_encoder(run).digest == encoder.digest
    finally:
        (run / "encoder" / "encoder.json").write_text(json.dumps(encoder.info))


def test_without_results_there_is_no_section(info):
    front, body = parts(card(info, format="xsmae"))
    assert "## Results" not in body
    assert "accuracy" not in body
    assert "metrics" not in front
    assert "datasets" not in front


@pytest.mark.parametrize(
    ("name", "listed"), [("owner/data_1", True), ("synthetic", False), ("a/b/c", False)]
)
def test_only_ids_of_hugging_face_are_its_data_sets(info, name, listed):
    info["run"] = {"data_name": name}
    front, body = parts(card(info, format="xsmae"))
    assert front.get("datasets") == ([name] if listed else None)
    assert cells(body)["data set"] == [name.replace("_", r"\_")]


def test_an_accuracy_without_interval(info):
    values = {**KNN["accuracy"], "accuracy_mean": [0.75], "image_statistics": [0.65]}
    info["run"] = {"knn": {**KNN, "accuracy": values}}
    _, body = parts(card(info, format="xsmae"))
    assert cells(body)["control: image statistics"] == ["-", "65.0"]
    assert "Brackets" not in body


def test_names_are_escaped(info):
    info["bands"] = ["near_infrared", "a|b", "[x](y)"]
    info["run"] = {
        "method": "cross_scale_mae",
        "knn": KNN,
        "data_name": 'x: "y"\n- z',
        "data": "Folder('`a`', \udcff)",
        "recipe": {"loss.name": "```\n# title"},
    }
    front, body = parts(card(info, format="xsmae"))
    assert "datasets" not in front
    assert front["tags"][-1] == "cross-scale-mae"
    assert r"| near\_infrared, a\|b, \[x\](y) |" in body
    assert r"3 classes: annual\_crop, a\|b, \*lake\* \<b\>." in body
    assert r"| Folder('\`a\`', \udcff) |" in body
    assert '\nloss.name = "\\u0060\\u0060\\u0060\\n# title"\n' in body


@pytest.mark.parametrize(
    ("licence", "expected"), [("cc-by-4.0", "cc-by-4.0"), ("ask us", None)]
)
def test_licences(info, licence, expected):
    info |= {"licence": licence, "data_licence": "CC BY-SA 3.0 IGO"}
    front, body = parts(card(info, format="xsmae"))
    assert front.get("license") == expected
    assert cells(body)["licence of the weights"] == [licence]
    assert cells(body)["licence of the data"] == ["CC BY-SA 3.0 IGO"]


def test_an_edited_file_is_kept(info, tmp_path):
    path = tmp_path / "README.md"
    assert write_card(tmp_path, info)
    first = path.read_bytes()
    assert write_card(tmp_path, {**info, "pooling": "cls"})
    assert path.read_bytes() != first
    for edited in (
        path.read_bytes() + b"Mine.\n",
        path.read_bytes().replace(b"\n", b"\r\n"),
        b"# Mine\n",
        b"",
        b"\xff",
    ):
        path.write_bytes(edited)
        assert not write_card(tmp_path, info)
        assert path.read_bytes() == edited
    path.write_bytes(first)
    assert write_card(tmp_path, info)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["README.md"]


@pytest.mark.parametrize(
    ("format", "call"),
    [("timm", "timm.create_model"), ("huggingface", "ViTModel.from_pretrained")],
)
def test_an_export_has_a_card(tmp_path, format, call):
    source = make_encoder(tmp_path / "source", position="gsd")
    notes = export(source, tmp_path / "out", format=format, gsd=4.0)
    front, body = parts((tmp_path / "out" / "README.md").read_text())
    assert front["library_name"] == LIBRARIES[format]
    assert call in body
    assert "4 m per pixel" in body
    assert "README.md" not in " ".join(notes)
    (tmp_path / "out" / "README.md").write_text("Mine.")
    notes = export(source, tmp_path / "out", format=format, gsd=2.0)
    assert "README.md" in notes[-1]
    assert (tmp_path / "out" / "README.md").read_text() == "Mine."
