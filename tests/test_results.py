"""Tables, CSV and figures of result rows."""

import csv
import dataclasses
import os
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from tests.support.rows import PROTOCOL, some_row
from xsmae.cli import results
from xsmae.evaluation.cells import cell
from xsmae.evaluation.rows import append
from xsmae.evaluation.tables import (
    create_tables,
    markdown,
    rival,
    statements,
    verdict,
)
from xsmae.evaluation.terminal import terminal_table
from xsmae.figures import results as pictures

CONTROL = {
    "name": "statistics", "kind": "statistics", "digest": "0" * 16, "pooling": None,
    "normalization": "none",
}  # fmt: skip


def rows_of(encoder=None, features=("cls", "mean"), protocol=PROTOCOL, seed=0):
    """The rows of an encoder at two scales and their average."""
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
    # Encoders come before controls, in any order of measurement.
    assert [(line.name, line.feature) for line in table.lines] == [
        ("ours", "cls"), ("ours", "mean"), ("statistics", "statistics"),
    ]  # fmt: skip
    text = markdown([table], {})
    assert (
        "| ours | mean patch | 60.0 [50.0, 70.0] | 80.0 [70.0, 90.0] | "
        "70.0 [65.0, 75.0] | no |"
    ) in text
    header = "|  | feature | 50 % (32 px) | 100 % (64 px) | average | beats controls |"
    assert header in text


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
    text = markdown([table], {})
    for heading in (
        "50 % (32 px)",
        "50 % (48 px)",
        "average of 50 % (32 px), 100 % (64 px)",
        "average of 50 % (48 px), 100 % (64 px)",
    ):
        assert heading in text
    row = "| theirs | mean patch | - | 80.0 [70.0, 90.0] | - | - | 80.0 [70.0, 90.0] | "
    row += "no control |"
    assert row in text


def test_the_protocol_stands_under_its_table_in_full():
    leaks = {
        "pixel_identical_test_images": 2,
        "example": {"test": "a/1.png", "train": "a/2.png"},
    }
    rows = [dataclasses.replace(row, leaks=leaks) for row in rows_of()]
    (table,) = create_tables(rows)
    text = "\n".join(statements(table))
    for fact in (
        "k=20", "temperature=0.07", "2000 resamples", "95 % interval", "64 px",
        "largest central square", "the true GSD of each scale", "seed 0",
        "20 training and 10 test images", "2 test image(s)",
        "50 %: 20, 100 %: 10 m",
    ):  # fmt: skip
        assert fact in text, fact
    assert "a/1.png and a/2.png" in terminal_table(rows)


def test_a_class_that_is_only_predicted_is_named():
    """It lowers the mean of one row alone."""
    segmented = {"metrics": {"pixel accuracy": [0.9, 0.8, 1.0]}}
    rows = [
        dataclasses.replace(
            row,
            **segmented,
            class_names=["road", "water"],
            confusion=[[8, wrong], [0, 0]],
            per_class={"road": 0.8} | ({"water": 0.0} if wrong else {}),
        )
        for row, wrong in zip(rows_of(), (2, 0), strict=False)
    ]
    (table,) = create_tables(rows)
    facts = [f for f in statements(table) if "no test pixel is water" in f]
    assert len(facts) == 1
    assert f"{rows[0].scale:g} %" in facts[0]
    assert "no test pixel is water" in terminal_table(rows)


def test_digests_are_in_the_appendix_alone():
    text = markdown(create_tables([*rows_of(), *controls()]), {})
    before, after = text.split("## Appendix")
    data = PROTOCOL.data
    digests = [data[p][n] for p in ("train", "test") for n in ("fingerprint", "split")]
    for digest in (*digests, PROTOCOL.key, "e" * 16, "0" * 16):
        assert digest not in before
        assert digest in after
    assert "classes 0 field, 1 roof" in after


def encoder_at(path, digest, **changes):
    origin = {"path": path}
    return {**some_row().encoder, "digest": digest * 16, "origin": origin, **changes}


def test_encoders_of_one_name_are_told_apart():
    first, second = encoder_at("a/encoder", "1"), encoder_at("b/encoder", "2")
    same_place = encoder_at("b/encoder", "3", name="other")
    rows = [*rows_of(first), *rows_of(second), *rows_of(second, seed=1)]
    (table,) = create_tables([*rows, *rows_of(same_place)])
    assert [line.name for line in table.lines if line.feature == "mean"] == [
        "ours (a/encoder)", "ours (b/encoder), seed 0", "ours (b/encoder), seed 1",
        "other",
    ]  # fmt: skip
    # Also across tables, and by the digest if nothing else differs.
    other = dataclasses.replace(PROTOCOL, task="linear_probe")
    tables = create_tables([*rows_of(first), *rows_of(second, protocol=other)])
    names = [{line.name for line in table.lines} for table in tables]
    assert names == [{"ours (a/encoder)"}, {"ours (b/encoder)"}]
    (table,) = create_tables([*rows_of(first), *rows_of(encoder_at("a/encoder", "2"))])
    assert {line.name for line in table.lines} == {"ours (111111)", "ours (222222)"}


def other_data(**changes):
    return dataclasses.replace(PROTOCOL, data={**PROTOCOL.data, **changes})


def test_data_and_protocols_of_one_name_are_told_apart():
    larger = other_data(test={**PROTOCOL.data["test"], "images": 1200})
    fixed = dataclasses.replace(PROTOCOL, gsd_policy="fixed")
    rows = [row for p in (PROTOCOL, larger, fixed) for row in rows_of(protocol=p)]
    assert [(t.data, t.heading) for t in create_tables(rows)] == [
        ("tiles (20 + 10 images)", "knn, tiles (20 + 10 images): gsd_policy=true"),
        ("tiles (20 + 1,200 images)", "knn, tiles (20 + 1,200 images)"),
        ("tiles (20 + 10 images)", "knn, tiles (20 + 10 images): gsd_policy=fixed"),
    ]
    split = other_data(test={**PROTOCOL.data["test"], "split": "9" * 16})
    names = [t.data for t in create_tables([*rows_of(), *rows_of(protocol=split)])]
    assert len(set(names)) == 2
    # A data set with two names counts as one.
    (table,) = create_tables([*rows_of(), *rows_of(protocol=other_data(name="x"))])
    assert (table.data, table.heading) == ("tiles", "knn, tiles")


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.80, 0.78, 0.82, "yes"),  # the best control has 0.7 [0.65, 0.75]
        (0.74, 0.72, 0.76, "not told"),
        (0.80, 0.75, 0.85, "not told"),
        (0.70, 0.65, 0.75, "no"),
        (0.40, 0.38, 0.42, "no"),
    ],
)
def test_what_beats_the_controls(value, low, high, expected):
    """The average counts, against the best control of any feature."""
    random = {**CONTROL, "kind": "random", "name": "random", "digest": "2" * 16}
    worse = [
        dataclasses.replace(row, value=0.1, low=0.0, high=0.2)
        for row in rows_of(random, ["cls"])
    ]
    ours = [
        dataclasses.replace(row, value=value, low=low, high=high)
        if row.scale == "average"
        else row
        for row in rows_of(features=["mean"])
    ]
    (table,) = create_tables([*ours, *worse, *controls()])
    verdicts = [verdict(line, table) for line in table.lines]
    assert verdicts == [expected, "-", "-"]
    said = "at average with the best control, statistics, statistics: 70.0 [65.0"
    assert any(said in text for text in statements(table))
    assert said in terminal_table([*ours, *worse, *controls()])


def test_an_encoder_is_compared_where_a_control_was_measured():
    at_100 = [row for row in controls() if row.scale == 100.0]
    (table,) = create_tables([*rows_of(features=["mean"]), *at_100])
    column, control = rival(table.lines[0], table)
    assert (column, control.kind) == ((100.0, 64), "statistics")
    (alone,) = create_tables(rows_of(features=["mean"]))
    assert rival(alone.lines[0], alone) is None
    assert verdict(alone.lines[0], alone) == "no control"


def test_features_are_named_in_the_terminal():
    probe = dataclasses.replace(PROTOCOL, task="linear_probe")
    text = terminal_table(rows_of(protocol=probe))
    assert "class token" in text
    assert "mean patch" in text


def test_report(tmp_path, capsys):
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    for row in [*rows_of(), *controls()]:
        append(file, row)
    # Giving a file twice does not change the rows.
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
    text = (out / "results.md").read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(links) == sorted(name for name in names if name.endswith(".png"))
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["protocol"] for row in rows} == {PROTOCOL.key}
    assert rows[2]["scale"] == "average"
    assert rows[2]["size"] == "32 64"
    assert float(rows[0]["value"]) == 0.6


def test_the_confusion_matrix_is_of_the_pooled_feature():
    (table,) = create_tables(rows_of())
    ((row, line),) = results.whole_images(table)
    assert (row.feature, row.scale, line.name) == ("mean", 100.0, "ours")


def test_names_that_make_no_file_name_get_figures_of_their_own(tmp_path):
    path = tmp_path / "results.jsonl"
    for digest, name in ("1", "森"), ("2", "林"), ("3", "a/b"), ("4", "a b"):
        append(path, some_row(encoder=encoder_at("", digest, name=name)))
    written = [file for file in results.write_report([path], tmp_path / "out")]
    assert len({file for file in written if "confusion" in file.name}) == 4
    assert all(file.exists() for file in written)


def test_names_stay_literal_in_markdown():
    encoder = encoder_at("", "1", name="a$x_1$ | *b*")
    text = markdown(create_tables([some_row(encoder=encoder)]), {})
    assert r"| a\$x_1\$ \| \*b\* |" in text


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
    pictures.confusion_matrix(tmp_path / "many.png", row, "ours", data="tiles")
    with Image.open(tmp_path / "many.png") as picture:
        assert min(picture.size) > 2000


def test_classes_that_are_not_utf8_or_look_like_formulas(tmp_path):
    path = tmp_path / "results.jsonl"
    names = [os.fsdecode(b"fi\xffeld"), "roof$x_$y{$"]
    append(path, some_row(class_names=names, per_class=dict.fromkeys(names, 0.8)))
    written = results.write_report([path], tmp_path / "out")
    assert {file.suffix for file in written} == {".md", ".csv", ".png"}


@pytest.mark.parametrize("features", [("cls",), ("cls", "mean")])
def test_equal_curves_are_all_seen(tmp_path, features):
    """Three encoders with equal, constant accuracies: their lines coincide."""
    rows = []
    for digest in "123":
        encoder = encoder_at(f"run {digest}", digest)
        for row in rows_of(encoder, features):
            rows.append(dataclasses.replace(row, value=0.8, low=0.79, high=0.81))
    (table,) = create_tables(rows)
    path = tmp_path / "scales.png"
    assert pictures.accuracy_by_scale(path, table)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # Look at a third of the way between the scales: no markers or bars are there.
    (a, b) = line_ends(picture, pictures.COLOURS[0])
    strip = picture[: int(0.8 * len(picture)), int(a + (b - a) * 0.3) :]
    strip = strip[:, : int((b - a) * 0.4)]
    for colour in pictures.COLOURS[:3]:
        assert near(strip, colour).sum() > 60, colour


def test_intervals_do_not_hide_each_other(tmp_path, monkeypatch):
    drawn, errorbar = [], Axes.errorbar

    def record(self, x, *args, **options):
        drawn.append(x)
        return errorbar(self, x, *args, **options)

    monkeypatch.setattr(Axes, "errorbar", record)
    rows = [
        row for d in "123456" for row in rows_of(encoder_at(f"run {d}", d), ["cls"])
    ]
    (table,) = create_tables(rows)
    assert pictures.accuracy_by_scale(tmp_path / "scales.png", table)
    places = np.array(drawn)
    assert (places[1:] / places[:-1] > 1.02).all()
    # At each scale they are nearer to it than to the next.
    assert np.abs(np.log2(places / (50, 100))).max() < 0.25


def test_scales_outside_of_the_training_are_marked():
    known = {**encoder_at("run 1", "1"), "gsd_range": [12.0, 30.0]}
    rows = rows_of(known, ["cls"]) + rows_of(encoder_at("run 2", "2"), ["cls"])
    (table,) = create_tables(rows)
    line, other = table.lines
    # 20 m at 50 %, 10 m at 100 %, both in the average.
    marks = [cell(line.cells[column]).endswith("]*") for column in table.columns]
    assert marks == [False, True, True]
    assert not any("*" in cell(row) for row in other.cells.values())
    (said,) = (text for text in statements(table) if text.startswith("*"))
    assert "12 to 30 m" in said
    assert line.name in said
    assert said in terminal_table(rows)


def near(picture, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(picture - rgb).max(-1) < 12


def line_ends(picture, colour):
    """The first and last column of the first panel with a colour."""
    half = near(picture[: int(0.8 * len(picture)), : picture.shape[1] // 2], colour)
    columns = np.flatnonzero(half.any(0))
    return columns[0], columns[-1]


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
        (["{tmp}/wrong.jsonl"], r"line 1 of .*wrong\.jsonl"),
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
