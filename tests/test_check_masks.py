"""`xsmae check-data` on images with masks, and what two parts share on the ground."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from tests.support.rasters import REASON, north_up, write
from xsmae.cli import check_data, check_masks
from xsmae.data.catalogue import build_masks
from xsmae.data.mask_survey import survey_masks
from xsmae.data.masks import MaskSource
from xsmae.data.overlaps import Quadrilateral, overlaps, quadrilateral_of
from xsmae.data.synthetic.labelled import LandSource
from xsmae.figures.mask_sheet import class_colours

CLASSES = {"classes": ["roof", "road", "lake"]}


def save(root, name, *, value=0, image=None, mask=None):
    for folder in ("images", "masks"):
        (root / f"{folder}/{name}").parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = np.full((40, 48, 3), value, np.uint8)
    if mask is None:
        mask = np.full((40, 48), value % 2, np.uint8)
    Image.fromarray(image).save(root / f"images/{name}.png")
    Image.fromarray(mask).save(root / f"masks/{name}.png")
    (root / "classes.json").write_text(json.dumps(CLASSES))


def run(root, tmp_path, *flags, gsd="0.5"):
    data = ["--data=segmentation", f"--data.root={root}", f"--data.gsd={gsd}"]
    return check_data.main(["check_data", *data, f"--out={tmp_path / 'out'}", *flags])


def report_of(tmp_path):
    return json.loads((tmp_path / "out/report.json").read_text())


@pytest.fixture
def root(tmp_path):
    """Two images each of five scenes; the ignored half of one mask."""
    folder = tmp_path / "data"
    for scene in range(5):
        for part in range(2):
            save(folder, f"s{scene}/{part}", value=10 * scene + part)
    mask = np.zeros((40, 48), np.uint8)
    mask[:20] = 255
    save(folder, "s0/0", value=0, mask=mask)
    (folder / "train.txt").write_text("s0/0\ns1/1\n")
    (folder / "test.txt").write_text("s2/0\ns3/1\ns4/1\n")
    return folder


def test_shares_of_the_classes_of_each_part(root, tmp_path, capsys):
    lists = ["--train.split=train.txt", "--test.split=test.txt"]
    assert run(root, tmp_path, *lists) == 0
    report, out = report_of(tmp_path), capsys.readouterr().out
    train, test = report["parts"]["train"], report["parts"]["test"]
    assert (train["images"], test["images"]) == (2, 3)
    assert train["classes"]["roof"] == {
        "pixels": 20 * 48,
        "share": pytest.approx(1 / 3),
    }
    assert test["classes"]["road"]["share"] == pytest.approx(2 / 3)
    assert (train["ignored"], test["ignored"]) == (0.25, 0)
    assert train["gsd"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    rows = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if line}
    assert rows["roof"] == ["33.33", "33.33"]
    assert rows["road"] == ["66.67", "66.67"]
    assert rows["ignored"] == ["25.00", "0.00"]
    assert "never in train: lake" in out
    assert report["between"] == {"ground": None, "pixels": [], "scenes": []}
    assert (tmp_path / "out/report.md").read_text().count("66.67") == 2
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    for colour in class_colours((), 3)[:3]:  # the lake is in the legend alone
        assert (pixels == colour).all(axis=-1).sum() > 100


def test_what_both_parts_have(root, tmp_path, capsys):
    save(root, "s2/9", value=11)  # the pixels of s1/1
    (root / "test.txt").write_text("s2/9\ns0/1\n")
    lists = ["--train.split=train.txt", "--test.split=test.txt"]
    assert run(root, tmp_path, *lists) == 0
    report, out = report_of(tmp_path), capsys.readouterr().out
    assert report["between"]["pixels"] == [["s1/1", "s2/9"]]
    assert report["between"]["scenes"] == ["s0"]
    assert "s1/1 = s2/9" in out
    assert "1 scenes are in both parts" in out


def test_scenes_divide_by_default_and_one_part_is_one_column(root, tmp_path, capsys):
    assert run(root, tmp_path) == 0
    report = report_of(tmp_path)
    assert [part["images"] for part in report["parts"].values()] == [8, 2]
    assert report["between"]["scenes"] == []
    assert run(root, tmp_path, "--train.split=all", "--test.split=all") == 0
    assert list(report_of(tmp_path)["parts"]) == ["all"]
    assert "between" not in report_of(tmp_path)
    assert "in both parts" not in capsys.readouterr().out.rpartition("all: ")[2]


def test_every_bad_pair_is_named_and_the_status_is_3(root, tmp_path, capsys):
    save(root, "s1/0", mask=np.full((40, 48), 9, np.uint8))
    save(root, "s2/0", mask=np.zeros((40, 47), np.uint8))
    (root / "images/s3/0.png").write_bytes(b"")
    assert run(root, tmp_path) == check_masks.UNUSABLE == 3
    rejected, printed = report_of(tmp_path)["rejected"], capsys.readouterr()
    names = {key.partition(": ")[2]: value for key, value in rejected.items()}
    assert set(names) == {"s1/0", "s2/0", "s3/0"}
    for name, text in (("s1/0", "value 9"), ("s2/0", "40 x 47"), ("s3/0", "0 bytes")):
        assert text in names[name]
        assert names[name] in printed.out
    assert "3 images or masks cannot be used" in printed.err
    for path in root.glob("masks/*/*.png"):
        path.write_bytes(b"")
    assert run(root, tmp_path) == 3
    assert len(report_of(tmp_path)["rejected"]) == 10


def test_wrong_flags_are_one_line(root, tmp_path, capsys):
    for flags, expected in (
        (["--data.rot=1"], "rot"),
        (["--data.scene=("], "scene='('"),
        (["--train.split=nowhere.txt"], "nowhere.txt"),
    ):
        assert run(root, tmp_path, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error
    assert check_data.main(["check_data", "--data=segmentation"]) == 2
    assert "--data.root=" in capsys.readouterr().err


def test_parts_of_other_classes_are_refused(root, tmp_path, capsys):
    other = tmp_path / "other"
    for scene in range(5):
        save(other, f"t{scene}/0")
    (other / "classes.json").write_text('{"classes": ["roof", "lake"]}')
    assert run(root, tmp_path, f"--test.root={other}") == 2
    assert "roof, road, lake" in capsys.readouterr().err
    same = f"--data.classes={root / 'classes.json'}"
    assert run(root, tmp_path, f"--test.root={other}", same) == 0


def test_a_table_is_checked_too(root, tmp_path):
    table = root / "pairs.csv"
    rows = [f"images/s{s}/0.png,masks/s{s}/0.png,s{s}" for s in range(5)]
    table.write_text("\n".join(["path,mask,scene", *rows]))
    assert run(table, tmp_path) == 0
    assert [p["images"] for p in report_of(tmp_path)["parts"].values()] == [4, 1]


def test_it_stops_when_asked(root, tmp_path, monkeypatch):
    def build(data):
        os.kill(os.getpid(), signal.SIGTERM)
        return build_masks(data)

    monkeypatch.setattr(check_masks, "build_masks", build)
    assert run(root, tmp_path) == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()


def test_the_built_in_world(tmp_path):
    flags = ["--data=synthetic_land", "--data.num_images=12", "--data.size=40"]
    flags += ["--test.num_images=10", f"--out={tmp_path / 'out'}", "--samples=4"]
    assert check_data.main(["check_data", *flags]) == 0
    report = report_of(tmp_path)
    assert [part["images"] for part in report["parts"].values()] == [12, 10]
    counts = [c["pixels"] for c in report["parts"]["test"]["classes"].values()]
    assert sum(counts) == 10 * 40 * 40
    source = LandSource(10, seed=1, size=40, gsd=1.0)
    assert counts == survey_masks(source).pixels()[:-1].tolist()


def test_statistics_are_those_of_valid_pixels(root):
    found = survey_masks(MaskSource(root, gsd=1))
    values = np.array([10 * s + p for s in range(5) for p in range(2)]) / 255
    mean, std = found.statistics()
    np.testing.assert_allclose(mean, [values.mean()] * 3)
    np.testing.assert_allclose(std, [values.std()] * 3)


def test_rasters_that_overlap_on_the_ground(tmp_path, capsys):
    """By a half, not at all beside each other, and in another CRS."""
    pytest.importorskip("rasterio", reason=REASON)
    root, side = tmp_path / "data", 64
    places = {
        "a": ("EPSG:32633", 500_000), "b": ("EPSG:32633", 500_640),
        "half": ("EPSG:32633", 500_320), "far": ("EPSG:32633", 600_000),
    }  # fmt: skip
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (crs, x) in places.items():
        options = {"crs": crs, "transform": north_up(x, 5_000_000, 10)}
        image = rng.integers(0, 9, (1, side, side)).astype(np.uint8)
        write(root / f"images/{name}.tif", image, **options)
        write(root / f"masks/{name}.tif", image % 3, **options)
    # The corner of "a" in the next zone; its grid is turned by some degrees.
    from rasterio import warp

    (x,), (y,) = warp.transform("EPSG:32633", "EPSG:32632", [500_000], [5_000_000])
    options = {"crs": "EPSG:32632", "transform": north_up(x, y, 10)}
    write(root / "images/other.tif", image + 1, **options)
    write(root / "masks/other.tif", image % 3, **options)
    # A tile beyond the edge of a scene has no values at all.
    empty = np.full((1, side, side), 99, np.uint8)
    options = {"crs": "EPSG:32633", "transform": north_up(700_000, 5_000_000, 10)}
    write(root / "images/empty.tif", empty, nodata=99, **options)
    write(root / "masks/empty.tif", empty % 3, **options)
    for folder in ("images", "masks"):
        (root / folder / "void.tif").write_bytes(
            (root / folder / "empty.tif").read_bytes()
        )
    (root / "classes.json").write_text(json.dumps(CLASSES))
    (root / "train.txt").write_text("a\nempty\nfar\n")
    (root / "test.txt").write_text("b\nhalf\nother\nvoid\n")
    flags = ["--data=segmentation", f"--data.root={root}", f"--out={tmp_path / 'out'}"]
    flags += ["--train.split=train.txt", "--test.split=test.txt"]
    assert check_data.main(["check_data", *flags]) == 0
    report = report_of(tmp_path)
    assert report["parts"]["train"]["ignored"] == pytest.approx(1 / 3)
    found = {tuple(pair): s for *pair, s in report["between"]["ground"]}
    assert found.pop(("empty", "void")) == pytest.approx(1)
    assert report["between"]["pixels"] == []
    assert found.keys() == {("a", "half"), ("a", "other")}
    assert found["a", "half"] == pytest.approx(0.5)
    assert 0.8 < found["a", "other"] < 0.99
    assert "a and half: 50.0% of the smaller one" in capsys.readouterr().out
    source = MaskSource(root)
    places = {source.id(i): source.raster(i) for i in range(len(source))}
    np.testing.assert_allclose(
        quadrilateral_of(places["a"], "a").corners[2], (500_640, 4_999_360)
    )


def test_the_overlap_of_turned_squares():
    square = np.array([(0, 0), (2, 0), (2, 2), (0, 2)], float)
    diamond = np.array([(1, -1), (3, 1), (1, 3), (-1, 1)], float)
    for order in (slice(None), slice(None, None, -1)):
        one = Quadrilateral("one", "EPSG:32633", square[order] + 5e6)
        other = Quadrilateral("other", "EPSG:32633", diamond + 5e6)
        # The diamond, of area 8, covers the whole square.
        assert overlaps([one], [other]) == [("one", "other", pytest.approx(1))]
        moved = Quadrilateral("moved", "EPSG:32633", diamond + 5e6 + [2, 0])
        # A triangle of height 1 and base 2.
        assert overlaps([one], [moved]) == [("one", "moved", pytest.approx(1 / 4))]
        beside = Quadrilateral("beside", "EPSG:32633", square + 5e6 + [2, 0])
        assert overlaps([one], [beside]) == []


def test_many_classes_have_different_colours():
    colours = class_colours((), 60)
    assert len({tuple(c) for c in colours.tolist()}) == 61
    given = class_colours([(1, 2, 3), (4, 5, 6)], 2)
    assert given.tolist() == [[1, 2, 3], [4, 5, 6], [255, 255, 255]]
