"""Features of whole images as a Parquet table, and its command."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.test_evaluation import mean_colour
from tests.test_protocol import Fingerprinted
from xsmae.cli import embed
from xsmae.errors import UserError
from xsmae.evaluation import image_tables
from xsmae.evaluation.embeddings import write_embeddings
from xsmae.evaluation.features import square
from xsmae.evaluation.subjects import FrozenEncoder, pixel_control

INFO = {
    "mean": [0], "std": [1], "bands": ["red", "green", "blue"], "image_size": 6,
    "pooling": "mean",
}  # fmt: skip


def colours(encode=mean_colour, **changes):
    fields = dict(
        name="colours", kind="encoder", digest="0" * 16, origin={}, info=INFO,
        features=("cls", "mean"), patch_size=2, reads_gsd=True, standardize=False,
        encode=encode,
    )  # fmt: skip
    return FrozenEncoder(**fields | changes)


def silent(line):
    pass


def told(path):
    return json.loads(pa.parquet.read_schema(path).metadata[b"xsmae"])


def test_a_row_an_image_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tables, "ROWS", 3)
    source, out = Fingerprinted(11, bad=[2, 4, 5, 6, 7]), tmp_path / "new" / "x.parquet"
    found = write_embeddings(colours(), source, out, batch_size=3, say=silent)
    assert found.images == 6
    assert found.unusable == {f"{i}.png": "no image" for i in (2, 4, 5, 6, 7)}
    table = pa.parquet.read_table(out)
    assert table.schema.names == ["id", "label", "gsd", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    used = [0, 1, 3, 8, 9, 10]
    assert table["id"].to_pylist() == [f"{i}.png" for i in used]
    assert table["label"].to_pylist() == [source.class_names[i % 3] for i in used]
    # 12 pixels of 1 + index metres become 6.
    assert table["gsd"].to_pylist() == [2.0 * (1 + i) for i in used]
    images = np.stack([square(source[i].image, 1.0, 6)[0] for i in used])
    expected = mean_colour(images, None)["mean"].astype(np.float32)
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), expected)
    assert pa.parquet.ParquetFile(out).num_row_groups == 2
    content = told(out)
    assert content["digest"] == "0" * 16
    assert (content["pooling"], content["image_size"]) == ("mean", 6)
    assert content["bands"] == INFO["bands"]
    metadata = pa.parquet.read_metadata(out).metadata
    assert json.loads(metadata[b"xsmae.unusable"]) == found.unusable


def test_without_labels_they_are_null(tmp_path):
    class Unlabelled(Fingerprinted):
        class_names = ()

        def __getitem__(self, index):
            record = super().__getitem__(index)
            return type(record)(record.image, record.gsd, None, record.id)

    out = tmp_path / "x.parquet"
    write_embeddings(colours(), Unlabelled(3), out, say=silent)
    assert pa.parquet.read_table(out)["label"].to_pylist() == [None] * 3


def test_size_and_pooling_can_be_chosen(tmp_path):
    def encode(images, gsd):
        return {"cls": gsd, "mean": np.zeros((len(images), 1))}

    out = tmp_path / "x.parquet"
    source = Fingerprinted(2)
    write_embeddings(colours(encode), source, out, size=4, pooling="cls", say=silent)
    table = pa.parquet.read_table(out)
    assert table["embedding"].to_pylist() == [[3.0, 3.0], [6.0, 6.0]]
    assert table["gsd"].to_pylist() == [3.0, 6.0]
    assert (told(out)["pooling"], told(out)["image_size"]) == ("cls", 4)


def broken(images, gsd):
    return {"mean": np.full((len(images), 2), np.nan)}


@pytest.mark.parametrize(
    ("encoder", "source", "changes", "said"),
    [
        (colours(), Fingerprinted(3), {"size": 5}, "size=5, expected a multiple"),
        (colours(), Fingerprinted(3), {"pooling": "max"}, "pooling=max, expected one"),
        (colours(), Fingerprinted(3), {"batch_size": 0}, "batch_size=0"),
        (colours(), Fingerprinted(2, bad=[0, 1]), {}, "none of the images"),
        (colours(broken), Fingerprinted(3), {}, r"not finite .*'0\.png'"),
        (pixel_control("statistics"), Fingerprinted(3), {}, "encoder=statistics is no"),
    ],
)
def test_a_failure_leaves_what_was_there(encoder, source, changes, said, tmp_path):
    out = tmp_path / "x.parquet"
    out.write_text("before")
    with pytest.raises(UserError, match=said):
        write_embeddings(encoder, source, out, say=silent, **changes)
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]
    assert out.read_text() == "before"


@pytest.mark.parametrize("out", ["", "/dev/null/x.parquet"])
def test_a_place_that_cannot_be_written(out, tmp_path):
    place = out or tmp_path
    with pytest.raises(UserError, match=r"cannot write to .*--out"):
        write_embeddings(colours(), Fingerprinted(3), place, say=silent)


def test_a_stop_leaves_nothing(tmp_path):
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(
            colours(), Fingerprinted(9), tmp_path / "x.parquet",
            batch_size=3, say=silent, should_stop=should_stop,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# The command

RANDOM = "--encoder=random:tiny,embed_dim=16,depth=1,num_heads=2,patch_size=8"


def call(*arguments):
    return embed.main(["xsmae embed", *map(str, arguments)])


def test_a_folder_and_its_config_give_the_same_rows(image_folder, tmp_path, capsys):
    (image_folder / "roof" / "broken.jpg").write_bytes(b"no image")
    shared = (RANDOM, "--size=40", "--batch_size=7")
    assert call(image_folder, "--gsd=0.5", f"--out={tmp_path / 'a'}", *shared) == 0
    printed = capsys.readouterr().out
    assert "left out: roof/broken.jpg: " in printed
    assert f"{tmp_path / 'a'}: 24 images, 1 left out" in printed
    data = ("--data=configs/folder.py", f"--data.root={image_folder}", "--data.gsd=0.5")
    assert call(*data, f"--out={tmp_path / 'b'}", *shared) == 0
    tables = [pa.parquet.read_table(tmp_path / name) for name in "ab"]
    for table in tables:
        assert table.num_rows == 24
        assert set(table["label"].to_pylist()) == {"field", "roof"}
        assert table["gsd"].to_pylist() == [0.5] * 24
        assert np.isfinite(np.stack(table["embedding"].to_numpy())).all()
    assert tables[0]["id"] == tables[1]["id"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FOLDER"], "--encoder is missing"),
        (["FOLDER", RANDOM], "neither gsd nor gsd_csv .*--gsd="),
        ([RANDOM], "0 folders given"),
        (["FOLDER", "FOLDER", RANDOM, "--gsd=1"], "2 folders given"),
        (["FOLDER", "--data=configs/folder.py", RANDOM], "1 folders and --data"),
        (["--data=configs/folder.py", RANDOM, "--gsd=1"], "--data.gsd"),
        (["FOLDER", RANDOM, "--gsd=1", "--pooling=max"], "pooling"),
        (["FOLDER", RANDOM, "--gsd=1", "--colour=red"], "colour"),
        (["nowhere", RANDOM, "--gsd=1"], "nowhere does not exist"),
        (["FOLDER", "--encoder=nowhere", "--gsd=1"], "encoder=nowhere"),
        (["FOLDER", RANDOM, "--gsd=1", "--stride=8"], "--stride .* as files"),
    ],
)
def test_what_is_refused_in_one_line(arguments, said, image_folder, tmp_path, capsys):
    arguments = [str(image_folder) if a == "FOLDER" else a for a in arguments]
    assert call(*arguments, f"--out={tmp_path / 'x.parquet'}") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert not (tmp_path / "x.parquet").exists()


def test_help_begins_with_an_example(capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("xsmae embed scenes/a.tif")
    assert "\n    xsmae embed images --gsd=0.5" in printed
    for flag in ("--encoder", "--gsd_csv", "--size", "--pooling", "--missing_bands"):
        assert flag in printed
