"""fMoW as distributed and as CSVs: boxes, GSDs, both kinds, bad JSONs."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from xsmae.data.fmow import FmowCsvSource, FmowSource
from xsmae.errors import BadImageError, UserError

BOX = {"category": "zoo", "box": [20, 10, 40, 40]}
SIZES = {"rgb": (100, 80), "msrgb": (50, 40)}
GSDS = {"rgb": 0.5, "msrgb": 1.0}


def write_record(root, split, category, number, *, kind="rgb", **metadata):
    """Writes a noise image and its JSON; returns the image's path."""
    place = root / split / category / f"{category}_{number}"
    place.mkdir(parents=True, exist_ok=True)
    width, height = SIZES[kind]
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    path = place / f"{category}_{number}_0_{kind}.jpg"
    Image.fromarray(pixels).save(path)
    content = {"gsd": GSDS[kind], "bounding_boxes": [BOX]} | metadata
    path.with_suffix(".json").write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path):
    for kind in SIZES:
        for number in range(2):
            write_record(tmp_path / "fmow", "train", "zoo", number, kind=kind)
            write_record(tmp_path / "fmow", "train", "airport", number, kind=kind)
        write_record(tmp_path / "fmow", "val", "zoo", 7, kind=kind)
    # The distributed test set has numbers instead of categories.
    unlabelled = tmp_path / "fmow" / "test" / "0000001"
    unlabelled.mkdir(parents=True)
    (unlabelled / "0000001_0_rgb.jpg").write_bytes(b"")
    return tmp_path / "fmow"


def pixels_of(source, index):
    return np.asarray(Image.open(source.path(index)))


def refused(match, make, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_train_split(root):
    source = FmowSource(root)
    assert [source.id(i) for i in range(4)] == [
        "airport/airport_0/airport_0_0_rgb.jpg",
        "airport/airport_1/airport_1_0_rgb.jpg",
        "zoo/zoo_0/zoo_0_0_rgb.jpg",
        "zoo/zoo_1/zoo_1_0_rgb.jpg",
    ]
    assert len(source) == 4
    assert source.class_names == ("airport", "zoo")
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
    record = source[2]
    assert (record.gsd, record.label, record.id) == (0.5, 1, source.id(2))


def test_labels_agree_between_splits(root):
    source = FmowSource(root, split="val")
    assert len(source) == 1
    assert source.class_names == ("airport", "zoo")
    np.testing.assert_array_equal(source.labels, [1])


def test_kinds_are_never_mixed(root):
    source = FmowSource(root, kind="msrgb", crop=False)
    assert len(source) == 4
    assert all(source.id(i).endswith("_msrgb.jpg") for i in range(4))
    assert {record.gsd for record in source} == {1.0}
    assert source[0].image.shape == (40, 50, 3)
    assert source.fingerprint != FmowSource(root, crop=False).fingerprint
    refused("kind is 'rgb8', expected rgb or msrgb", FmowSource, root, kind="rgb8")


def test_crop_with_context_and_whole(root):
    whole = FmowSource(root, crop=False)
    np.testing.assert_array_equal(whole[2].image, pixels_of(whole, 2))
    # Box x 20..60, y 10..50; a quarter of 40 on each side.
    expected = pixels_of(whole, 2)[0:60, 10:70]
    np.testing.assert_array_equal(FmowSource(root)[2].image, expected)
    expected = pixels_of(whole, 2)[10:50, 20:60]
    np.testing.assert_array_equal(FmowSource(root, context=0.0)[2].image, expected)
    refused("context is -1", FmowSource, root, context=-1)


def test_small_box_grows_to_min_side(root):
    box = {"category": "zoo", "box": [95, 1, 3, 3]}
    write_record(root, "train", "zoo", 0, bounding_boxes=[box])
    source = FmowSource(root)
    np.testing.assert_array_equal(source[2].image, pixels_of(source, 2)[:32, 68:])


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (BOX, (20, 10, 60, 50)),
        ([{"category": "prison", "box": [0, 0, 99, 70]}, BOX], (20, 10, 60, 50)),
        (
            [
                {"category": "false_detection", "box": [0, 0, 50, 50]},
                {"category": "prison", "box": [0, 20, 50, 40]},
            ],
            (0, 20, 50, 60),
        ),
        ([{"category": "false_detection", "box": [0, 0, 50, 50]}], (0, 0, 100, 80)),
        ([], (0, 0, 100, 80)),
        (None, (0, 0, 100, 80)),
    ],
    ids=["dict", "own category", "not false", "only false", "none", "null"],
)
def test_which_box(root, boxes, expected):
    write_record(root, "train", "zoo", 0, bounding_boxes=boxes)
    source = FmowSource(root, context=0.0)
    left, top, right, bottom = expected
    np.testing.assert_array_equal(
        source[2].image, pixels_of(source, 2)[top:bottom, left:right]
    )


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"gsd": None}, "gsd None"),
        ({"gsd": 0}, "gsd 0"),
        ({"gsd": -0.5}, "gsd -0.5"),
        ({"gsd": float("nan")}, "gsd nan"),
        ({"gsd": float("inf")}, "gsd inf"),
        ({"gsd": "0.5"}, "gsd '0.5'"),
        ({"gsd": True}, "gsd True"),
        ({"bounding_boxes": 7}, "bounding_boxes"),
        ({"bounding_boxes": [7]}, "bounding_boxes"),
        ({"bounding_boxes": {"category": "zoo"}}, "the box None"),
        ({"bounding_boxes": {"category": "zoo", "box": [1, 2, 3]}}, "the box"),
        ({"bounding_boxes": {"category": "zoo", "box": [1, 2, 3, "4"]}}, "the box"),
        ({"bounding_boxes": {"category": "zoo", "box": [200, 0, 9, 9]}}, "lie in"),
        ({"bounding_boxes": {"category": "zoo", "box": [0, 0, 0, 9]}}, "lie in"),
    ],
)
def test_bad_metadata_is_a_bad_image(root, metadata, match):
    write_record(root, "train", "zoo", 0, **metadata)
    source = FmowSource(root)
    with pytest.raises(BadImageError, match=match) as caught:
        source[2]
    assert str(root) not in str(caught.value)
    assert source[3].gsd == 0.5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_broken_json_is_a_bad_image(root, content):
    source = FmowSource(root)
    source.path(0).with_suffix(".json").write_bytes(content)
    with pytest.raises(BadImageError, match=r"airport_0_0_rgb.json"):
        source[0]


def test_missing_json_and_broken_image_are_bad_images(root):
    source = FmowSource(root)
    source.path(0).with_suffix(".json").unlink()
    source.path(1).write_bytes(source.path(1).read_bytes()[:300])
    for index, match in [(0, "does not exist"), (1, "decoded|readable")]:
        with pytest.raises(BadImageError, match=match):
            source[index]
    # One bad record does not make a bad data set.
    assert len(FmowSource(root)) == 4


def test_no_gsd_at_all_is_refused_at_once_unless_given(root):
    for path in root.rglob("*.json"):
        path.unlink()
    refused(
        "no GSD for the first 4 images, airport/.*--config.data.gsd", FmowSource, root
    )
    refused("gsd: .* 0, .* above 0", FmowSource, root, gsd=0)
    assert FmowSource(root, gsd=0.3, crop=False)[0].gsd == 0.3
    # The box comes from the JSON.
    with pytest.raises(BadImageError, match="does not exist"):
        FmowSource(root, gsd=0.3)[0]


def test_given_gsd_goes_before_the_json(root):
    assert FmowSource(root, gsd=0.3)[0].gsd == 0.3


def test_missing_and_empty_splits_are_refused(root):
    refused("'dev', .*test, train, val", FmowSource, root, split="dev")
    refused(r"no <category>", FmowSource, root, split="test")
    refused("does not exist", FmowSource, root / "none")
    for path in root.rglob("*_msrgb.jpg"):
        path.unlink()
    refused(r"no <category>.*_msrgb.jpg", FmowSource, root, kind="msrgb")


def test_fingerprint_and_pickle(root, tmp_path):
    source = FmowSource(root)
    shutil.copytree(root, tmp_path / "moved")
    assert FmowSource(tmp_path / "moved").fingerprint == source.fingerprint
    others = [
        FmowSource(root, crop=False),
        FmowSource(root, context=0.5),
        FmowSource(root, gsd=1),
        FmowSource(root, split="val"),
    ]
    write_record(root, "train", "zoo", 0, gsd=0.4567)
    others.append(FmowSource(root))
    prints = {other.fingerprint for other in others} | {source.fingerprint}
    assert len(prints) == len(others) + 1
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    np.testing.assert_array_equal(copy[2].image, source[2].image)


def write_table(root, columns, *cells, kind="rgb"):
    paths = sorted(
        p.relative_to(root).as_posix() for p in root.rglob(f"train/*/*/*_{kind}.jpg")
    )
    table = root / "train_62classes.csv"
    rows = [",".join([*cells, path]) for path in paths]
    table.write_text("\n".join([columns, *rows]))
    return table


def test_csv_gives_what_the_folder_gives(root):
    table = write_table(root, "category,image_path", "zoo")
    source, folder = FmowCsvSource(table), FmowSource(root)
    assert len(source) == len(folder) == 4
    assert source.class_names == ("zoo",)
    for mine, theirs in zip(source, folder, strict=True):
        assert mine.id == f"train/{theirs.id}"
        assert mine.gsd == theirs.gsd
        np.testing.assert_array_equal(mine.image, theirs.image)
    whole = FmowCsvSource(table, crop=False)
    np.testing.assert_array_equal(whole[0].image, pixels_of(whole, 0))
    assert len(FmowCsvSource(table, split="test", test_fraction=0.5)) == 2


def test_csv_gsd_column_goes_before_the_json(root):
    table = write_table(root, "category,gsd,image_path", "zoo", "0.25")
    assert FmowCsvSource(table)[0].gsd == 0.25
    for path in root.rglob("*.json"):
        path.unlink()
    assert FmowCsvSource(table, crop=False)[0].gsd == 0.25


def test_csv_that_are_refused(root):
    refused(
        "4 of 4 paths .*_rgb.jpg",
        FmowCsvSource,
        write_table(root, "path", kind="msrgb"),
    )
    refused("no path column", FmowCsvSource, write_table(root, "id"))
    table = write_table(root, "path")
    refused("4 of 4 paths .*_msrgb.jpg", FmowCsvSource, table, kind="msrgb")
    for path in root.rglob("*.json"):
        path.unlink()
    refused("no GSD for the first 4", FmowCsvSource, table)


def test_csv_fingerprint_sees_the_json(root):
    table = write_table(root, "path")
    before = FmowCsvSource(table).fingerprint
    write_record(root, "train", "zoo", 0, gsd=0.4567)
    assert FmowCsvSource(table).fingerprint != before


def test_short_paths_have_no_category(tmp_path):
    path = write_record(tmp_path / "fmow", "train", "zoo", 0)
    flat = tmp_path / "flat"
    flat.mkdir()
    for suffix in (".jpg", ".json"):
        shutil.copy(path.with_suffix(suffix), flat)
    table = flat / "list.csv"
    table.write_text(f"path\n{pathlib.Path(path).name}\n")
    assert FmowCsvSource(table)[0].image.shape == (60, 60, 3)
