"""TFDS sources: the tests prepare them as ArrayRecord, without TensorFlow."""

import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from xsmae.data import fmow_tfds
from xsmae.data.fmow import FmowSource
from xsmae.data.splits import split_indices
from xsmae.data.tfds import TfdsSource
from xsmae.errors import BadImageError, UserError

COUNT = 30


def encoded(seed, size=(36, 34)):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Tiles(tfds.core.GeneratorBasedBuilder):
    """Like eurosat or uc_merced: one split, labels and file names."""

    VERSION = tfds.core.Version("1.2.0")
    FEATURES = ("image", "label", "filename")

    def _info(self):
        known = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["field", "wood"]),
            "filename": tfds.features.Text(),
            "bands": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
        features = {name: known[name] for name in self.FEATURES}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(COUNT):
            # Number 3 is truncated, number 4 is too small.
            data = encoded(number, (36, 20) if number == 4 else (36, 34))
            example = {
                "image": io.BytesIO(data[:900] if number == 3 else data),
                "label": number % 2,
                "filename": f"{number}.png",
                "bands": np.zeros(2, np.float32),
            }
            yield number, {name: example[name] for name in self.FEATURES}


class PlainTiles(Tiles):
    """No labels, no names."""

    FEATURES = ("image",)


class BandTiles(Tiles):
    """No image."""

    FEATURES = ("bands",)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Tiles, PlainTiles, BandTiles):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tiles(data_dir, name="tiles", **kwargs):
    return TfdsSource(name, data_dir=data_dir, **({"gsd": 10} | kwargs))


def refused(match, make, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_reads_every_record(data_dir):
    source = tiles(data_dir)
    assert len(source) == COUNT
    assert source.class_names == ("field", "wood")
    seen = {}
    for index in range(COUNT):
        name, label = source.id(index), source.labels[index]
        assert label == int(name.removesuffix(".png")) % 2
        if name in ("3.png", "4.png"):
            with pytest.raises(BadImageError, match=r"decoded|min_side"):
                source[index]
            continue
        record = source[index]
        assert (record.id, record.gsd, record.label) == (name, 10.0, label)
        seen[name] = record.image
    assert len(seen) == COUNT - 2
    expected = np.asarray(Image.open(io.BytesIO(encoded(7))))
    np.testing.assert_array_equal(seen["7.png"], expected)


def test_limits_are_ours(data_dir):
    source = tiles(data_dir, min_side=20)
    index = [source.id(i) for i in range(COUNT)].index("4.png")
    assert source[index].image.shape == (20, 36, 3)
    with pytest.raises(BadImageError, match="max_pixels=9"):
        tiles(data_dir, max_pixels=9)[index]


def test_published_split(data_dir):
    everything = tiles(data_dir)
    ids = [everything.id(i) for i in range(COUNT)]
    parts = {}
    for split in ("train", "test"):
        source = tiles(data_dir, split=split, test_fraction=0.2)
        parts[split] = [source.id(i) for i in range(len(source))]
        expected = split_indices(ids, everything.labels, split, 0.2)
        assert parts[split] == [ids[i] for i in expected]
        np.testing.assert_array_equal(source.labels, everything.labels[expected])
        good = [
            i for i, name in enumerate(parts[split]) if name not in ("3.png", "4.png")
        ]
        assert source[good[0]].id == parts[split][good[0]]
    assert [len(parts["train"]), len(parts["test"])] == [24, 6]
    assert sorted(parts["train"] + parts["test"]) == sorted(ids)


def test_split_list(data_dir, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("5.png\n7.png\n")
    source = tiles(data_dir, split=str(listed))
    assert {record.id for record in source} == {"5.png", "7.png"}
    listed.write_text("none.png\n")
    refused("'none.png'", tiles, data_dir, split=str(listed))


def test_without_labels_and_names(data_dir):
    source = tiles(data_dir, "plain_tiles", min_side=1)
    assert source.labels is None
    assert source.class_names == ()
    assert source.id(4) == "train/4"
    assert len(tiles(data_dir, "plain_tiles", split="test")) == 3
    with pytest.raises(IndexError):
        source[COUNT]


def test_fingerprint_repr_and_pickle(data_dir):
    source = tiles(data_dir, split="train")
    assert repr(source) == f"TfdsSource(26 images, fingerprint={source.fingerprint})"
    assert tiles(data_dir, split="train").fingerprint == source.fingerprint
    others = [
        tiles(data_dir),
        tiles(data_dir, split="test"),
        tiles(data_dir, gsd=20),
        tiles(data_dir, "plain_tiles"),
    ]
    prints = {other.fingerprint for other in others} | {source.fingerprint}
    assert len(prints) == len(others) + 1
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    assert [copy.id(i) for i in range(5)] == [source.id(i) for i in range(5)]


def test_what_is_refused(data_dir, tmp_path):
    refused("no 'image' feature, .*bands", tiles, data_dir, "band_tiles")
    refused("no gsd feature .*--config.data.gsd", tiles, data_dir, gsd=None)
    refused("gsd: .* -1, .* above 0", tiles, data_dir, gsd=-1)
    how = "no prepared 'eurosat/rgb'.*tfds build eurosat/rgb --file_format=array_record"
    refused(how, tiles, data_dir, "eurosat/rgb")
    refused("no prepared 'tiles'", tiles, tmp_path / "none")
    refused("no prepared 'tiles:9.0.0'", tiles, data_dir, "tiles:9.0.0")
    refused("no prepared 'a name'", tiles, data_dir, "a name")
    refused("split='val', .*'all', 'train', 'test'", tiles, data_dir, split="val")


def test_tfrecord_is_refused(data_dir, tmp_path):
    # Only the metadata is read, so no TensorFlow is needed to write TFRecords.
    target = tmp_path / "tiles" / "1.2.0"
    target.mkdir(parents=True)
    for path in (data_dir / "tiles" / "1.2.0").iterdir():
        text = path.read_bytes().replace(b"array_record", b"tfrecord")
        (target / path.name.replace("array_record", "tfrecord")).write_bytes(text)
    refused("prepared as tfrecord, expected array_record", tiles, tmp_path)


def test_no_records_are_refused(data_dir, tmp_path):
    target = tmp_path / "tiles" / "1.2.0"
    shutil.copytree(data_dir / "tiles" / "1.2.0", target)
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"splits": []}))
    refused("no records", tiles, tmp_path)


def damage(data_dir, tmp_path, change):
    """A copy of `tiles` with the bytes of its one shard changed."""
    target = tmp_path / "tiles" / "1.2.0"
    target.mkdir(parents=True)
    for path in (data_dir / "tiles" / "1.2.0").iterdir():
        data = bytearray(path.read_bytes())
        if "array_record" in path.name:
            data = change(data)
        (target / path.name).write_bytes(data)
    return tmp_path


def test_damaged_file_is_refused(data_dir, tmp_path):
    def garble(data):
        data[200::97] = bytes(255 ^ value for value in data[200::97])
        return data

    refused("damaged.*prepare it again", tiles, damage(data_dir, tmp_path, garble))


def test_file_cut_short_is_refused(data_dir, tmp_path):
    broken = damage(data_dir, tmp_path, lambda data: data[: len(data) // 2])
    refused("damaged.*prepare it again", tiles, broken)


def test_damage_met_later_is_a_bad_image(data_dir, monkeypatch):
    source = tiles(data_dir)
    monkeypatch.setattr(type(source._data), "__getitem__", lambda self, key: 1 / 0)
    with pytest.raises(BadImageError, match="damaged: division by zero"):
        source[5]
    assert source.id(5) == "train/5"
    with pytest.raises(UserError, match=r"record 0 of tiles.*again"):
        _ = source.labels


def test_record_beyond_a_cut_is_a_bad_image(data_dir, monkeypatch):
    source = tiles(data_dir)
    # array_record 0.8 returns this for a truncated file.
    nothing = {"image": None, "label": None, "filename": None}
    monkeypatch.setattr(type(source._data), "__getitem__", lambda self, key: nothing)
    with pytest.raises(BadImageError, match="truncated"):
        source[5]


# fMoW, prepared by our builder


def write_record(root, split, category, number, **metadata):
    """Writes a noise image and its JSON in fMoW's layout; returns the image's path."""
    place = root / split / category / f"{category}_{number}"
    place.mkdir(parents=True)
    path = place / f"{category}_{number}_0_rgb.jpg"
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (80, 100, 3), np.uint8)).save(path)
    boxes = {"category": category, "box": [20, 10, 40, 40]}
    content = {"gsd": 0.5, "bounding_boxes": boxes} | metadata
    path.with_suffix(".json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def fmow(tmp_path_factory):
    """The root of a small fMoW, and the folder with its prepared files."""
    root = tmp_path_factory.mktemp("fmow")
    for number in range(3):
        write_record(root, "train", "zoo", number)
        write_record(root, "train", "airport", number, bounding_boxes=[])
    write_record(root, "train", "zoo", 3, gsd=0.0)
    write_record(root, "val", "zoo", 8, gsd=0.75)
    broken = write_record(root, "val", "zoo", 9)
    broken.write_bytes(broken.read_bytes()[:500])
    prepared = tmp_path_factory.mktemp("prepared")
    assert fmow_tfds.main([f"--root={root}", f"--data_dir={prepared}"]) == 0
    return root, prepared


@pytest.mark.parametrize("crop", [True, False])
def test_fmow_is_what_the_files_give(fmow, crop):
    root, prepared = fmow
    source = TfdsSource("fmow/rgb", data_dir=prepared, split="train", crop=crop)
    files = FmowSource(root, split="train", crop=crop)
    expected = {files.id(i): i for i in range(len(files))}
    # One record has no GSD.
    del expected["zoo/zoo_3/zoo_3_0_rgb.jpg"]
    assert {source.id(i) for i in range(len(source))} == set(expected)
    assert source.class_names == files.class_names
    for index, record in enumerate(source):
        theirs = files[expected[record.id]]
        np.testing.assert_array_equal(record.image, theirs.image)
        assert record.gsd == pytest.approx(theirs.gsd, rel=1e-6)
        assert record.label == theirs.label == source.labels[index]


def test_fmow_splits_are_its_own(fmow):
    _, prepared = fmow
    val = TfdsSource("fmow/rgb", data_dir=prepared, split="val")
    assert len(val) == 2
    good = [val.id(i) for i in range(2)].index("zoo/zoo_8/zoo_8_0_rgb.jpg")
    assert val[good].gsd == 0.75
    with pytest.raises(BadImageError, match="decoded"):
        val[1 - good]
    assert len(TfdsSource("fmow/rgb", data_dir=prepared)) == 8
    kwargs = {"data_dir": prepared, "split": "test"}
    refused("no split 'test', .*train, val", TfdsSource, "fmow/rgb", **kwargs)
    refused("gsd=1 is given", TfdsSource, "fmow/rgb", data_dir=prepared, gsd=1)


def test_fmow_is_read_by_tfds_itself_without_tensorflow(fmow):
    _, prepared = fmow
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "data = tfds.data_source('fmow/rgb', data_dir=sys.argv[1], split='train')\n"
        "print(len(data), data[0]['image'].shape, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(prepared)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "6 (80, 100, 3) False"


def test_fmow_main_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert fmow_tfds.main([f"--root={tmp_path}", "--data_dir=unused"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no <category>" in error
    assert not pathlib.Path("unused").exists()


def test_fmow_that_is_not_prepared_says_how(tmp_path):
    how = "no prepared 'fmow/rgb'.*python -m xsmae.data.fmow_tfds --root="
    refused(how, TfdsSource, "fmow/rgb", data_dir=tmp_path)
