"""Tables, CSV and pictures of result rows."""

import csv
import dataclasses
import os
import re

import numpy as np
import pytest
from PIL import Image

from tests.support.rows import PROTOCOL, some_row
from xsmae.cli import results
from xsmae.evaluation.rows import append
from xsmae.evaluation.tables import create_tables, markdown, statements, terminal_table
from xsmae.figures import results as pictures

CONTROL = {
    "name": "statistics", "kind": "statistics", "digest": "0" * 16, "pooling": None,
    "normalization": "none",
}  # fmt: skip


def rows_of(encoder=None, features=("cls", "mean"), protocol=PROTOCOL, seed=0):
    """Two scales and their average of an encoder."""
    encoder = encoder or some_row().encoder
    rows = []
    for feature in features:
        for scale, size, value in ((50.0, 32, 0.6), (100.0, 64, 0.8)):
            rows.append(
                some_row(
                    encoder=encoder,
                    feature=feature,
                    scale=scale,
                    size=size,
                    value=value,
                    low=value - 0.1,
                    high=value + 0.1,
                    protocol=protocol,
                    seed=seed,
                    gsd_told=640 / size,
                )
            )
        average = {"scale": "average", "scales": [50.0, 100.0], "size": [32, 64]}
        rows.append(
            dataclasses.replace(
                rows[-1], **average, value=0.7, low=0.65, high=0.75, confusion=None
            )
        )
    return rows


def controls(protocol=PROTOCOL):
    return rows_of(CONTROL, ["statistics"], protocol)


def test_a_table_of_one_protocol():
    (table,) = create_tables([*controls(), *rows_of()])
    assert table.columns == [
        (50.0, 32), (100.0, 64), ("average", (50.0, 100.0), (32, 64)),
    ]  # fmt: skip
    # Encoders before controls, in whatever order they were measured.
    assert [(line.name, line.feature) for line in table.lines] == [
        ("ours", "cls"), ("ours", "mean"), ("statistics", "statistics"),
    ]  # fmt: skip
    text = markdown([table])
    assert (
        "| ours | mean patch | 60.0 [50.0, 70.0] | 80.0 [70.0, 90.0] | "
        "70.0 [65.0, 75.0] |"
    ) in text
    assert "|  | feature | 50 % (32 px) | 100 % (64 px) | average |" in text


@pytest.mark.parametrize(
    "change",
    [
        {"gsd_policy": "fixed"},
        {"options": {"k": 5, "temperature": 0.07}},
        {"base_size": 65},
        {"resize": "bicubic"},
        {"task": "linear_probe"},
        {"data": {**PROTOCOL.data, "classes": 3}},
    ],
)
def test_other_protocols_share_no_column(change):
    other = dataclasses.replace(PROTOCOL, **change)
    tables = create_tables([*rows_of(), *rows_of(protocol=other), *controls()])
    assert [table.protocol for table in tables] == [PROTOCOL, other]
    assert [len(table.lines) for table in tables] == [3, 2]


def test_another_size_or_other_scales_are_another_column():
    other = {**some_row().encoder, "digest": "1" * 16, "name": "theirs"}
    rows = rows_of()
    rows.append(some_row(encoder=other, scale=50.0, size=48))
    rows.append(
        some_row(encoder=other, scale="average", scales=[50.0, 100.0], size=[48, 64])
    )
    (table,) = create_tables(rows)
    text = markdown([table])
    for heading in (
        "50 % (32 px)",
        "50 % (48 px)",
        "average of 50 % (32 px), 100 % (64 px)",
        "average of 50 % (48 px), 100 % (64 px)",
    ):
        assert heading in text
    assert "| theirs | mean patch | - | 80.0 [70.0, 90.0] | - | - |" in text


def test_the_protocol_stands_under_its_table_in_full():
    leaks = {
        "pixel_identical_test_images": 2,
        "example": {"test": "a/1.png", "train": "a/2.png"},
    }
    rows = [dataclasses.replace(row, leaks=leaks) for row in rows_of()]
    (table,) = create_tables(rows)
    text = "\n".join(statements(table))
    data = PROTOCOL.data
    for part in ("train", "test"):
        assert data[part]["fingerprint"] in text
        assert data[part]["split"] in text
    for fact in (
        "k=20", "temperature=0.07", "2000 resamples", "95 % interval", "64 px",
        "largest central square", "the true one of each scale", "e" * 16, "seed 0",
        "20 training and 10 test images", "2 test image(s) equal a training image",
        "50 %: 20, 100 %: 10 m",
    ):  # fmt: skip
        assert fact in text, fact
    assert "a/1.png and a/2.png" in terminal_table(rows)


def test_encoders_of_one_name_are_told_apart():
    other = {**some_row().encoder, "digest": "1" * 16}
    (table,) = create_tables([*rows_of(), *rows_of(other), *rows_of(seed=1)])
    text = markdown([table])
    for name in ("ours [eeeeee], seed 0", "ours [eeeeee], seed 1", "ours [111111]"):
        assert f"| {name}" in text


def test_report(tmp_path, capsys):
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    for row in [*rows_of(), *controls()]:
        append(file, row)
    # Twice the same file: the rows stay what they are.
    assert results.main(["results", str(file), str(file), f"--out={out}"]) == 0
    printed = capsys.readouterr().out.split()
    stem = f"knn_tiles_{PROTOCOL.key}"
    names = {
        "results.md", "results.csv", f"scales_{stem}.png",
        f"confusion_{stem}_ours.png", f"confusion_{stem}_statistics.png",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    assert set(printed) == {str(out / name) for name in names}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 400
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["protocol"] for row in rows} == {PROTOCOL.key}
    assert rows[2]["scale"] == "average"
    assert rows[2]["size"] == "32 64"
    assert float(rows[0]["value"]) == 0.6


def test_the_confusion_matrix_is_of_the_pooled_feature():
    (table,) = create_tables(rows_of())
    ((row, name),) = results.whole_images(table)
    assert (row.feature, row.scale, name) == ("mean", 100.0, "ours")


def test_pictures_of_many_classes_and_of_one_without_images(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(62)]
    confusion = rng.integers(0, 30, (62, 62))
    confusion[7] = 0
    per_class = {
        name: confusion[i, i] / confusion[i].sum()
        for i, name in enumerate(names)
        if i != 7
    }
    row = some_row(class_names=names, per_class=per_class, confusion=confusion.tolist())
    pictures.confusion_matrix(tmp_path / "many.png", row, "ours")
    with Image.open(tmp_path / "many.png") as picture:
        assert min(picture.size) > 2000


def test_classes_that_are_not_utf8_or_look_like_formulas(tmp_path):
    path = tmp_path / "results.jsonl"
    names = [os.fsdecode(b"fi\xffeld"), "roof$x_$y{$"]
    append(path, some_row(class_names=names, per_class=dict.fromkeys(names, 0.8)))
    written = results.write_report([path], tmp_path / "out")
    assert {file.suffix for file in written} == {".md", ".csv", ".png"}


def test_a_long_protocol_makes_the_curves_no_wider(tmp_path):
    sizes = []
    for options in ({"k": 20}, {"penalties": [10.0**n for n in range(-20, 20)]}):
        protocol = dataclasses.replace(PROTOCOL, options=options)
        rows = [dataclasses.replace(row, protocol=protocol) for row in rows_of()]
        (table,) = create_tables(rows)
        assert pictures.accuracy_by_scale(tmp_path / "scales.png", table)
        with Image.open(tmp_path / "scales.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] < 1.05 * sizes[0][0]


def test_one_scale_has_no_curve(tmp_path):
    (table,) = create_tables([some_row()])
    assert not pictures.accuracy_by_scale(tmp_path / "none.png", table)
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no file is given"),
        (["{tmp}/nothing.jsonl"], "does not exist"),
        (["{tmp}/empty.jsonl"], "has no rows"),
        (["{tmp}/wrong.jsonl"], "line 1 of .* is no result row"),
        (["{tmp}/good.jsonl", "--out={tmp}/wrong.jsonl"], "cannot write to"),
        (["--nothing=1"], "nothing"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path, capsys, arguments, said):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    append(tmp_path / "good.jsonl", some_row())
    arguments = [text.format(tmp=tmp_path) for text in arguments]
    assert results.main(["results", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("xsmae: ")
    assert re.search(said, error), error
