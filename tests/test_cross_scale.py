"""kNN across scales: cells with known values, its rows, tables and heat maps."""

import csv
import dataclasses
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from tests.support.encoders import counting_encoder, tiny_encoder
from tests.support.rows import some_row
from tests.support.sources import Fingerprinted, HeldOut
from xsmae.cli import knn, results
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.evaluate import evaluate
from xsmae.evaluation.rows import append, read
from xsmae.evaluation.tables import create_tables, heading, markdown, statements
from xsmae.evaluation.terminal import terminal_table
from xsmae.figures.cross_scale import colour_range

TRAIN, TEST = Fingerprinted(30), HeldOut(15, seed=1)
SCALES = (25, 50, 100)  # 3, 6 and 12 px


def swapping(images, gsd):
    """The class as one of three axes; at 6 px, red and green change places."""
    axes = np.eye(3)[images.mean(axis=(1, 2)).argmax(axis=1)]
    axes = axes[:, [1, 0, 2]] if images.shape[1] == 6 else axes
    return {"cls": axes, "mean": np.eye(3)[np.zeros(len(images), int)]}


def across(encoder, tmp_path, **options):
    how = {"task": "knn_cross_scale", "scales": SCALES, "k": 3, "controls": False}
    how |= {"results": tmp_path / "rows.jsonl", "cache": tmp_path / "cache"} | options
    return evaluate(encoder, TRAIN, TEST, **how)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of an encoder with known cells, and of two controls."""
    folder = tmp_path_factory.mktemp("across")
    encoder = counting_encoder([], encode=swapping)
    # No architecture, so no random control.
    return across(dataclasses.replace(encoder, kind="fake"), folder, controls=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The rows of kNN and of kNN across scales, of an encoder and all controls."""
    folder = tmp_path_factory.mktemp("both")
    how = {"scales": (40, 70, 100), "controls": True}
    usual = across(tiny_encoder(), folder, task="knn", **how)
    return usual, across(tiny_encoder(), folder, **how), folder


def test_cells_with_known_values(rows):
    """Five of 15 test images are blue: they alone are right between 6 px and others."""
    row, constant = rows[:2]
    third = 1 / 3
    expected = [[1, third, 1], [third, 1, third], [1, third, 1]]
    np.testing.assert_allclose(np.array(row.cells)[..., 0], expected)
    assert row.cells[0][0] == row.cells[2][0] == [1.0, 1.0, 1.0]
    assert row.cells[0][1][1] < third < row.cells[0][1][2]
    assert row.metrics["diagonal"] == [1.0, 1.0, 1.0]
    assert row.metrics["off_diagonal"] == [row.value, row.low, row.high]
    assert row.value == pytest.approx((2 * 1 + 4 * third) / 6)
    assert row.low < row.value < row.high
    assert row.per_class == pytest.approx({"red": third, "green": third, "blue": 1})
    assert (row.scale, row.scales, row.size) == ("average", [25, 50, 100], [3, 6, 12])
    # The median image has 12 m per pixel at 100 %.
    assert row.gsd_told == pytest.approx([48, 24, 12])
    # The lowest class wins a tie of equal features: red, a third of the images.
    assert np.ravel(constant.cells)[::3] == pytest.approx([third] * 9)


def test_the_default_is_all_pairs_of_four_scales(tmp_path):
    encoder = dataclasses.replace(counting_encoder([]), patch_size=1)
    (row,) = across(encoder, tmp_path, scales=None, base_size=16, feature="cls")
    assert row.scales == [12.5, 25.0, 50.0, 100.0]
    assert np.shape(row.cells) == (4, 4, 3)


def test_the_diagonal_is_knn_at_one_scale(both):
    usual, crossed, _ = both
    of = {(r.encoder["digest"], r.feature, r.scale): r for r in usual}
    assert {row.feature for row in crossed} == {
        "cls",
        "mean",
        "thumbnail",
        "statistics",
    }
    for row in crossed:
        who = row.encoder["digest"], row.feature
        for place, scale in enumerate(row.scales):
            one = of[(*who, scale)]
            assert row.cells[place][place] == [one.value, one.low, one.high]
        mean = of[(*who, "average")]
        assert row.metrics["diagonal"] == [mean.value, mean.low, mean.high]
        assert row.gsd_told == mean.gsd_told
        assert row.feature_scaling == mean.feature_scaling


def test_features_are_shared_with_knn_and_rows_are_measured_once(both, capsys):
    usual, crossed, folder = both
    how = {"scales": (40, 70, 100), "controls": True}
    again = across(tiny_encoder(), folder, results=folder / "new.jsonl", **how)
    assert [row.cells for row in again] == [row.cells for row in crossed]
    assert "images/s" not in capsys.readouterr().out
    assert across(tiny_encoder(), folder, **how) == crossed
    assert capsys.readouterr().out.count("already has its rows") == 3
    assert read(folder / "rows.jsonl") == usual + crossed


def test_images_that_differ_between_scales_are_refused(tmp_path):
    calls = []

    class Flaky(HeldOut):
        def __getitem__(self, index):
            calls.append(index)
            if calls.count(4) == 1 and index == 4:
                raise BadImageError("the network is down")
            return TEST[index]

    with pytest.raises(UserError, match=r"other images at 50 % than at 25 %.*--cache"):
        evaluate(
            counting_encoder([]), TRAIN, Flaky(15, seed=1), task="knn_cross_scale",
            scales=SCALES, k=3, controls=False, cache=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("scales", ["100", ""])
def test_one_scale_is_refused(tmp_path, capsys, scales):
    status = knn.main(
        [
            "knn", "--cross_scale", "--encoder=statistics", "--data=quickstart",
            "--data.num_images=40", "--test.num_images=20", f"--scales={scales}",
            f"--results={tmp_path / 'rows.jsonl'}",
        ]
    )  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(r"scales=(100|\(none\)), expected 2 or more", error), error


def test_the_command_prints_the_matrix(tmp_path, capsys):
    arguments = [
        "--cross_scale", "--encoder=statistics", "--data=quickstart", "--k=3",
        "--data.num_images=40", "--test.num_images=20", "--data.size=32",
        "--scales=50,100", f"--results={tmp_path / 'rows.jsonl'}",
        f"--cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    assert knn.main(["knn", *arguments]) == 0
    printed = capsys.readouterr().out
    row, _ = read(tmp_path / "rows.jsonl")
    assert row.protocol.task == "knn_cross_scale"
    lines = printed.splitlines()
    at = lines.index(row.encoder["name"])
    header = " ".join(lines[at + 1].split())
    assert header == "bank / queries 50 % (16 px) 100 % (32 px)"
    for line, cells in zip(lines[at + 2 : at + 4], row.cells, strict=True):
        shown = [float(x) for x in re.findall(r"([\d.]+) \[", line)]
        assert shown == pytest.approx([100 * value for value, *_ in cells], abs=0.05)
    assert "same scale" in printed
    assert "other scale" in printed


# Tables and figures


def test_rows_across_scales_share_no_table_with_knn(both):
    usual, crossed, _ = both
    tables = create_tables(usual + crossed)
    assert [t.protocol.task for t in tables] == ["knn", "knn_cross_scale"]
    table = tables[1]
    names = [heading(column, table) for column in table.columns]
    assert names == ["same scale (diagonal)", "other scale (off-diagonal)"]
    for line, row in zip(table.lines, crossed[:2], strict=False):
        shown = [[r.value, r.low, r.high] for r in map(line.cells.get, table.columns)]
        assert shown == [row.metrics["diagonal"], row.metrics["off_diagonal"]]
    text = "\n".join(statements(table))
    assert "reads no GSD" in text.split("thumbnail")[-1]
    assert re.search(r"median GSD given 40 %: [\d.]+, 70 %: [\d.]+, 100 %: ", text)


def test_the_matrix_in_the_report(rows):
    (table,) = create_tables(rows)
    text = markdown([table])
    assert "| bank / queries | 25 % (3 px) | 50 % (6 px) | 100 % (12 px) |" in text
    cell = rows[0].cells[0][1]
    shown = "33.3 [{:.1f}, {:.1f}]".format(*(100 * x for x in cell[1:]))
    line = f"| 25 % (3 px) | 100.0 [100.0, 100.0] | {shown} | 100.0 [100.0, 100.0] |"
    assert line in text
    assert shown in terminal_table(rows)


def test_other_scales_are_other_columns(rows):
    two = dataclasses.replace(
        rows[0], scales=[50.0, 100.0], size=[6, 12], gsd_told=[24.0, 12.0],
        cells=[cells[1:] for cells in rows[0].cells[1:]],
    )  # fmt: skip
    (table,) = create_tables([*rows, two])
    names = [heading(column, table) for column in table.columns]
    assert len(set(names)) == 4
    assert "same scale (diagonal) of 50 % (6 px), 100 % (12 px)" in names
    assert markdown([table]).count("| bank / queries |") == len(rows) + 1


def test_what_beats_the_controls_is_off_the_diagonal(rows):
    """Off the diagonal, the encoder is right for 5 of 9."""
    row = dataclasses.replace(rows[0], encoder={**rows[0].encoder, "kind": "encoder"})
    for share, verdict in ((0.1, "yes"), (0.9, "no")):
        mean = [share, share - 0.05, share + 0.05]
        other = dataclasses.replace(
            rows[-1],
            encoder={**rows[-1].encoder, "kind": "statistics"},
            metrics={"diagonal": [1.0, 1.0, 1.0], "off_diagonal": mean},
        )
        assert f"| {verdict} |" in markdown(create_tables([row, other]))


def test_heat_maps_have_one_colour_range(both, tmp_path, monkeypatch):
    _, crossed, _ = both
    drawn, imshow = [], Axes.imshow

    def record(self, values, **options):
        drawn.append((values.shape, options["vmin"], options["vmax"]))
        return imshow(self, values, **options)

    monkeypatch.setattr(Axes, "imshow", record)
    for row in crossed:
        append(tmp_path / "rows.jsonl", row)
    written = results.write_report([tmp_path / "rows.jsonl"], tmp_path / "out")
    maps = [file for file in written if file.name.startswith("cross_scale_")]
    # An untrained encoder with two features and two controls: 3 files, 4 panels.
    assert len(maps) == 3
    assert len(drawn) == 4
    ((shape, low, high),) = set(drawn)
    assert shape == (3, 3)
    cells = 100 * np.array([row.cells for row in crossed])[..., 0]
    assert low <= cells.min() <= cells.max() <= high
    assert (low, high) == colour_range(crossed)
    for file in maps:
        with Image.open(file) as picture:
            assert min(picture.size) > 400
        assert f"]({file.name})" in (tmp_path / "out" / "results.md").read_text()


def test_the_colour_range_ends_at_multiples_of_five():
    cells = [[[0.312, 0, 1], [0.5, 0, 1]], [[0.6, 0, 1], [0.64, 0, 1]]]
    assert colour_range([some_row(cells=cells)]) == (30.0, 65.0)
    assert colour_range([some_row(cells=[[[0.5, 0.5, 0.5]]])]) == (45.0, 50.0)
    assert colour_range([some_row(cells=[[[1.0, 1.0, 1.0]]])]) == (95.0, 100.0)
    assert colour_range([some_row(cells=[[[0.0, 0.0, 0.0]]])]) == (0.0, 5.0)


def test_the_spreadsheet_has_the_cells(rows, tmp_path):
    append(tmp_path / "rows.jsonl", rows[0])
    results.write_report([tmp_path / "rows.jsonl"], tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["cells"].startswith("25>25=1; 25>50=0.333333; 25>100=1; 50>25=0.333333")
    assert line["metrics"] == "diagonal=1; off_diagonal=0.555556"
