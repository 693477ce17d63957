"""`xsmae check-data`: counts, duplicates, refused images, the contact sheet."""

import json
import os
import signal

import numpy as np
import pytest
from absl import flags
from PIL import Image

from xsmae.cli import check_data, evaluation
from xsmae.data.catalogue import build_source
from xsmae.data.folder import FolderSource
from xsmae.data.images import decode
from xsmae.data.survey import survey
from xsmae.data.tables import CsvSource


def run(root, tmp_path, *flags, gsd="0.5"):
    data = ["--data=configs/folder.py", f"--data.root={root}", f"--data.gsd={gsd}"]
    return check_data.main(["check_data", *data, f"--out={tmp_path / 'out'}", *flags])


def report_of(tmp_path):
    return json.loads((tmp_path / "out/report.json").read_text())


def test_statistics_are_those_of_the_images(image_folder):
    found = survey(FolderSource(image_folder, gsd=0.5))
    pixels = [decode(path) / 255.0 for path in sorted(image_folder.rglob("*.jpg"))]
    mean, std = found.statistics()
    np.testing.assert_allclose(mean, np.mean(pixels, axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, np.std(pixels, axis=(0, 1, 2)), rtol=1e-9)
    left_out = {found.source.id(i) for i in range(12)}
    mean, _ = found.statistics(left_out)
    np.testing.assert_allclose(mean, np.mean(pixels[12:], axis=(0, 1, 2)), rtol=1e-12)


def test_a_large_image_counts_as_one(tmp_path):
    for name, side, value in (("a", 40, 0), ("b", 400, 255)):
        Image.new("RGB", (side, side), (value,) * 3).save(tmp_path / f"{name}.png")
    mean, std = survey(FolderSource(tmp_path, gsd=1)).statistics()
    assert mean == [0.5] * 3
    assert std == [0.5] * 3


def test_report(image_folder, tmp_path, capsys):
    """Classes, sizes, GSDs, duplicates, refusals; the mean leaves out the test part."""
    roof = image_folder / "roof"
    double = roof / "double.png"
    Image.open(roof / "00.jpg").save(double)
    (roof / "broken.jpg").write_bytes(b"<html>")
    (roof / "empty.jpg").write_bytes(b"")
    (roof / "labels.json").write_text("{}")
    assert run(image_folder, tmp_path) == check_data.TOO_MANY
    report, printed = report_of(tmp_path), capsys.readouterr()
    assert report["images"] == 27
    assert report["too_many_rejected"]
    assert report["notes"] == FolderSource(image_folder, gsd=0.5).notes()
    assert printed.out.count("1 file (1 .json)") == 1
    assert report["classes"] == {"field": 12, "roof": 13}
    assert report["width"] == report["height"] == {"min": 40, "median": 40, "max": 40}
    assert report["gsd"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    assert report["identical"] == [["roof/00.jpg", "roof/double.png"]]
    refused = {"roof/broken.jpg", "roof/empty.jpg"}
    assert {key.partition(": ")[2] for key in report["rejected"]} == refused
    test = FolderSource(image_folder, gsd=0.5, split="test")
    held_out = sum(test.id(i) not in refused for i in range(len(test)))
    assert report["statistics_of"] == 25 - held_out
    assert "roof/00.jpg = roof/double.png" in printed.out
    assert "broken.jpg: not a readable JPEG" in printed.out
    assert "2 of 27 images" in printed.err
    assert "more than 1:" in printed.err
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.width > 1000
    assert "roof/00.jpg = roof/double.png" in (tmp_path / "out/report.md").read_text()


def test_one_bad_image_of_a_few_is_not_too_many(image_folder, tmp_path, capsys):
    """The same limit as in training."""
    (image_folder / "roof" / "broken.jpg").write_bytes(b"<html>")
    assert run(image_folder, tmp_path) == 0
    assert not report_of(tmp_path)["too_many_rejected"]
    assert "broken.jpg: not a readable JPEG" in capsys.readouterr().out


def test_names_that_are_not_utf8_or_look_like_formulas(image_folder, tmp_path, capsys):
    odd = image_folder / os.fsdecode(b"ro\xffof$x_$y{$")
    (image_folder / "roof").rename(odd)
    (odd / os.fsdecode(b"br\xe4ken.jpg")).write_bytes(b"<html>")
    assert run(image_folder, tmp_path) == 0
    told = r"ro\udcffof$x_$y{$/br\udce4ken.jpg: not a readable JPEG"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/contact_sheet.png").exists()


def test_pixels_of_the_test_part(tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    for name, value in (("a", 10), ("b", 200), ("c", 10)):
        Image.new("RGB", (40, 40), (value,) * 3).save(root / f"{name}.png")
    table, test = root / "images.csv", tmp_path / "test.txt"
    table.write_text("path,gsd\na.png,1\nb.png,2\nc.png,4\n")
    test.write_text("c.png\n")
    flags = ["--data=configs/csv.py", f"--data.csv_path={table}"]
    flags += [f"--test.split={test}", f"--out={tmp_path / 'out'}", "--samples=2"]
    assert check_data.main(["check_data", *flags]) == 0
    report = report_of(tmp_path)
    assert report["identical_in_test"] == [["a.png", "c.png"]]
    assert report["gsd"] == {"min": 1, "median": 2, "max": 4}
    assert report["statistics_of"] == 2
    np.testing.assert_allclose(report["mean"], [105 / 255] * 3)
    assert "1 images have the pixels of a test image" in capsys.readouterr().out
    assert CsvSource(table)[2].gsd == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--samples=0"], "samples=0, expected 1 or more"),
        (["--smples=3"], "smples"),
        (["more"], "more"),
        (["--data.rot=x"], "rot"),
        (["--data.gsd=-1"], "gsd"),
    ],
)
def test_wrong_flags(flags, expected, image_folder, tmp_path, capsys):
    assert run(image_folder, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_no_data_and_no_image(tmp_path, capsys):
    assert check_data.main(["check_data"]) == 2
    assert "--data" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"")
    assert run(tmp_path / "images", tmp_path, "--test.split=all") == 2
    assert "a.jpg: the file is empty" in capsys.readouterr().err


def test_it_stops_when_asked(image_folder, tmp_path, monkeypatch, capsys):
    def build(data):
        os.kill(os.getpid(), signal.SIGTERM)
        return build_source(data)

    monkeypatch.setattr(check_data, "build_source", build)
    assert run(image_folder, tmp_path) == 128 + signal.SIGTERM
    assert "xsmae: stopped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_field_set_for_one_part_is_not_set_for_the_other():
    given = ["--data=configs/folder.py", "--train.root=one", "--test.root=other"]
    fields, rest = evaluation.split_parts(["check-data", *given])
    assert rest == ["check-data", "--data=configs/folder.py"]
    values = flags.FlagValues()
    evaluation.define_data(values)
    values(rest)
    config = evaluation.parts_of(values, fields, doc="xsmae check-data")
    found = (config.data.root, config.train.root, config.test.root)
    assert found == (None, "one", "other")
