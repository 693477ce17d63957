"""The kNN vote against scikit-learn, ties, tiling, devices; the command."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from tests.support.devices import run_on_devices
from xsmae.bands import Bands
from xsmae.cli import knn
from xsmae.cli import pretrain as pretraining
from xsmae.cli.arguments import parse
from xsmae.data.catalogue import build_source
from xsmae.evaluation.rows import read
from xsmae.evaluation.tasks.knn import knn_predict, nearest, vote
from xsmae.run.knn import create_monitors
from xsmae.trainer import create_trainer
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder

ROOT = Path(__file__).parent.parent


# The vote


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_vote_is_scikit_learns(k, temperature):
    rng = np.random.default_rng(k)
    bank, queries = rng.normal(size=(700, 12)), rng.normal(size=(150, 12))
    labels = rng.integers(0, 7, len(bank))
    theirs = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(bank, labels)
    found = knn_predict(
        bank, labels, queries, num_classes=7, k=k, temperature=temperature
    )
    np.testing.assert_array_equal(found, theirs.predict(queries))
    similarity, rows = nearest(bank, queries, k=k)
    distance, their_rows = theirs.kneighbors(queries)
    np.testing.assert_array_equal(rows, their_rows)
    np.testing.assert_allclose(similarity, 1 - distance, atol=2e-7)


@pytest.mark.parametrize("bank_chunk", [1, 3, 4, 5, 4096])
def test_of_equal_similarities_the_lower_row_is_nearer(bank_chunk):
    bank = np.tile([[1.0, 0], [0, 1], [-1, 0]], (5, 1))
    _, rows = nearest(bank, [[2.0, 0], [0, 3]], k=7, bank_chunk=bank_chunk)
    assert rows.tolist() == [[0, 3, 6, 9, 12, 1, 4], [1, 4, 7, 10, 13, 0, 2]]


def test_equal_images_are_equally_similar_wherever_they_lie():
    """The same vector in every row of a tile: float32 products could differ by row."""
    rng = np.random.default_rng(0)
    bank = np.tile(rng.normal(size=(1, 501)).astype(np.float32), (200, 1))
    queries = rng.normal(size=(37, 501)).astype(np.float32)
    similarity, rows = nearest(bank, queries, k=20, bank_chunk=67)
    assert (similarity == similarity[:, :1]).all()
    np.testing.assert_array_equal(rows, np.tile(np.arange(20), (37, 1)))


def test_of_equal_votes_the_lower_class_wins():
    similarity = np.array([[0.5, 0.5, 0.3, 0.3], [0.9, 0.5, 0.5, 0.1]])
    labels = np.array([[3, 1, 1, 3], [2, 0, 2, 0]])
    found = vote(similarity, labels, num_classes=4, temperature=0.07)
    assert found.tolist() == [1, 2]


def test_tiling_changes_no_bit():
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(333, 40)), rng.normal(size=(77, 40))
    bank[200:260] = bank[:60]
    expected = nearest(bank, queries, k=20)
    for chunk, bank_chunk in ((1, 333), (7, 10), (76, 332), (500, 21), (32, 64)):
        found = nearest(bank, queries, k=20, chunk=chunk, bank_chunk=bank_chunk)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_devices_change_no_bit():
    found = {n: run_on_devices("tests.support.knn_on_devices", n) for n in (1, 4)}
    assert [found[n].pop("devices") for n in (1, 4)] == [1, 4]
    assert found[1] == found[4]


def test_stops_between_two_tiles():
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(KeyboardInterrupt):
        nearest(
            np.ones((9, 2)), np.ones((4, 2)), k=1, bank_chunk=1, should_stop=should_stop
        )
    assert len(asked) == 4


# The binary


@pytest.fixture
def data(image_folder):
    """Flags for the folder; one image is in both parts by its pixels."""
    copied = (image_folder / "roof" / "00.jpg").read_bytes()
    (image_folder / "roof" / "02.jpg").write_bytes(copied)
    names = sorted(p.relative_to(image_folder) for p in image_folder.glob("*/*.jpg"))
    split = {"train": [], "test": []}
    for name in names:
        split["test" if int(name.stem) in (2, 3, 6, 9) else "train"].append(str(name))
    flags = [
        "--data=configs/folder.py",
        f"--data.root={image_folder}",
        "--data.gsd=0.5",
    ]
    for part, ids in split.items():
        path = image_folder.parent / f"{part}.txt"
        path.write_text("\n".join(ids))
        flags.append(f"--{part}.split={path}")
    return flags


def call(tmp_path, *arguments):
    return knn.main(
        [
            "knn",
            f"--results={tmp_path / 'results.jsonl'}",
            f"--cache={tmp_path / 'cache'}",
            *arguments,
        ]
    )


SMALL = "--encoder=random:tiny,embed_dim=16,num_heads=2,depth=1,patch_size=4"


def test_rows_of_an_encoder_and_its_controls(tmp_path, data, capsys):
    assert call(tmp_path, SMALL, *data, "--scales=20,50,100", "--k=3") == 0
    printed = capsys.readouterr().out
    rows = read(tmp_path / "results.jsonl")
    # Three scales and their average, for two features and two pixel controls.
    assert len(rows) == 4 * 4
    assert {row.encoder["kind"] for row in rows} == {
        "random", "statistics", "thumbnail",
    }  # fmt: skip
    assert len({row.protocol.key for row in rows}) == 1
    assert len({row.identity for row in rows}) == len(rows)
    for row in rows:
        assert row.low <= row.value <= row.high
        assert row.num_train == 20
        assert row.num_test == 4
        assert row.leaks["pixel_identical_test_images"] == 1
        assert row.leaks["example"] == {"test": "roof/02.jpg", "train": "roof/00.jpg"}
    assert "1 test image(s)" in printed
    assert "roof/02.jpg and roof/00.jpg" in printed
    of = {(r.encoder["kind"], r.feature, r.scale): r for r in rows}
    statistics = of["statistics", "statistics", 100.0]
    assert statistics.value == 1.0  # the class is the colour
    assert statistics.confusion == [[2, 0], [0, 2]]
    assert statistics.gsd_told is None
    # 40 px of 0.5 m are resized to 20, 50 and 100 % of 40 px.
    told = {s: of["random", "cls", s].gsd_told for s in (20.0, 50.0, 100.0)}
    assert told == pytest.approx({20.0: 2.5, 50.0: 1.0, 100.0: 0.5})
    average = of["random", "mean", "average"]
    values = [of["random", "mean", s].value for s in (20.0, 50.0, 100.0)]
    assert average.value == pytest.approx(np.mean(values))
    assert average.size == [8, 20, 40]
    # A second call adds no row and computes nothing.
    before = (tmp_path / "results.jsonl").read_bytes()
    assert call(tmp_path, SMALL, *data, "--scales=20,50,100", "--k=3") == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before
    again = capsys.readouterr().out
    assert "images/s" not in again
    assert again.count(f"{tmp_path / 'results.jsonl'} already has its rows") == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_monitor_measures_what_the_binary_does(tmp_path, dtype):
    """Monitor and command give the same number for an encoder, with any dtype."""
    images = {"data.num_images": 200, "data.size": 40, "data.gsd": 1.5}
    model = {"embed_dim": 48, "num_heads": 3, "depth": 2, "dtype": dtype}
    fields = {
        **images,
        **{f"model.{name}": value for name, value in model.items()},
        "knn.test.num_images": 300,
        "views.size": 24,
        "model.patch_size": 4,
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    config = parse(
        ["xsmae", "--config=configs/quickstart.py:size=tiny", *arguments],
        pretraining.define_flags,
    ).config
    trainer = create_trainer(config, num_images=200)
    state = trainer.initial_state()
    _, monitor = create_monitors(config, build_source(config.data))
    found = monitor.accuracy(functools.partial(trainer.encode, state.params))
    encoder = nnx.merge(trainer.graphdef, state.params, state.batch_stats).encoder
    described = describe_encoder(
        config.model, image_size=24, bands=Bands.of(config), run={}
    )
    Encoder(encoder, described).save(tmp_path / "encoder")
    done = call(
        tmp_path, f"--encoder={tmp_path / 'encoder'}", "--data=configs/quickstart.py",
        *(f"--{name}={value}" for name, value in images.items()),
        "--test.num_images=300", "--base_size=24", "--scales=100",
    )  # fmt: skip
    assert done == 0
    rows = read(tmp_path / "results.jsonl")
    assert {row.size for row in rows} == {24}
    of = {(row.encoder["kind"], row.feature): row.value for row in rows}
    assert found == {name: of["encoder", name] for name in ("cls", "mean")}
    controls = monitor.controls(functools.partial(trainer.encode, state.params))
    assert controls["image_statistics"] == of["statistics", "statistics"]


def test_fixed_gsd_is_another_protocol(tmp_path, data):
    arguments = (SMALL, *data, "--scales=50,100", "--k=3")
    assert call(tmp_path, *arguments) == 0
    assert call(tmp_path, *arguments, "--gsd=fixed") == 0
    rows = [r for r in read(tmp_path / "results.jsonl") if r.feature == "mean"]
    assert [r.gsd_told for r in rows] == [
        1.0, 0.5, [1.0, 0.5], 0.5, 0.5, [0.5, 0.5],
    ]  # fmt: skip
    assert len({r.protocol.key for r in rows}) == 2


def test_k_and_data_are_other_protocols(tmp_path, data):
    arguments = ("--encoder=statistics", *data, "--scales=100")
    for more in ([], ["--k=3"], ["--temperature=1"], ["--data.gsd=0.6"]):
        assert call(tmp_path, *arguments, *more) == 0
    rows = read(tmp_path / "results.jsonl")
    assert len({row.protocol.key for row in rows}) == 4
    assert len(rows) == 2 * 4  # each with a thumbnail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scales=5,100"], "5 % of 40 px is 2 px.*one patch of 4 px"),
        (["--scales=50,52"], r"50 % is 20 px, 52 % is 20 px.*patches of 4 px"),
        (["--scales=x"], "scales=x, expected percent"),
        (["--scales=0"], "expected percent above 0"),
        (["--scales="], "expected percent above 0"),
        (["--k=0"], "k=0, temperature=0.07, expected k of 1 or more"),
        (["--k=21"], "k=21 is more than the 20 training images: give --k=20 or less"),
        (["--temperature=nan"], "temperature above 0"),
        (["--feature=cls,no"], "feature=cls,no, expected one or both of cls,mean"),
        (["--batch_size=0"], "batch_size=0, expected 1 or more"),
        (["--encoder=nowhere"], "encoder=nowhere: no such folder"),
        (["--encoder=random:giant"], "size 'giant', expected one of tiny"),
        (["--encoder=random:tiny,x=1"], "no field 'x', expected one of patch_size,"),
        (["--encoder=random:tiny,num_heads=5"], "multiple of 5 heads"),
        (["--encoder=random:tiny,embed_dim=190"], "random:tiny,embed_dim=190 is not"),
        (["--encoder=random:tiny,depth=abc"], "random:tiny,depth=abc is not"),
        (["--encoder=random:tiny,patch_size=0"], "random:tiny,patch_size=0 is not"),
        (["--encoder=random:tiny,position=foo"], "position='foo', expected one of"),
        (["--train.split=all"], "^xsmae: 4 images are in both .*--test.split"),
        (["--train.nothing=1"], "--train.nothing=1: there is no .*one of .*, split,"),
        (["--results=/dev/null/rows"], "cannot write to /dev/null/rows: .*--results"),
        (["--results=/tmp"], "cannot write to /tmp: Is a directory; give another"),
        (["--no_such=1"], "no_such"),
        (["--data.gsd=-1"], "the train part: .*GSD is -1.0.*--train.gsd"),
        (["--gsd=some"], "gsd"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path, data, capsys, arguments, said):
    given = any(argument.startswith("--encoder=") for argument in arguments)
    encoder = () if given else (SMALL,)
    assert call(tmp_path, *encoder, *data, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("xsmae: ")
    assert re.search(said, error), error
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"train": "roof"}, r"2 of the 4 test images .* training image \(field\)"),
        ({"train": "roof", "test": "roof"}, r"all training .* one class \(roof\)"),
    ],
)
def test_parts_whose_classes_cannot_be_told_are_refused(
    tmp_path, data, capsys, kept, said
):
    for part, name in kept.items():
        path = tmp_path / f"{part}.txt"
        flag = next(f for f in data if f.startswith(f"--{part}.split="))
        listed = Path(flag.partition("=")[2]).read_text().split()
        path.write_text("\n".join(i for i in listed if i.startswith(name)))
        data = [*data, f"--{part}.split={path}"]
    assert call(tmp_path, SMALL, *data, "--k=1") == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert len(error.splitlines()) == 1


def test_too_little_memory_is_told(tmp_path, data, capsys, monkeypatch):
    def fail(*arguments, **names):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nof it")

    monkeypatch.setattr(knn, "measure", fail)
    assert call(tmp_path, SMALL, *data) == 2
    error = capsys.readouterr().err
    assert "too little memory (RESOURCE_EXHAUSTED: Out of memory of it)" in error
    assert "lower --batch_size" in error


def test_another_failure_of_a_device_is_no_error_of_the_user(monkeypatch):
    def fail(*arguments, **names):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(knn.commandline, "parse", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        knn.main(["knn"])


def test_without_data_or_encoder(tmp_path, data, capsys):
    assert call(tmp_path, SMALL) == 2
    assert "--data is missing: xsmae knn --encoder=" in capsys.readouterr().err
    assert call(tmp_path, *data) == 2
    assert "--encoder is missing: xsmae knn --encoder=" in capsys.readouterr().err
    assert call(tmp_path) == 2
    assert "--encoder and --data are missing: xsmae knn" in capsys.readouterr().err
    assert call(tmp_path, SMALL, *data, "--data=folder") == 2
    assert "--data is given 2 times" in capsys.readouterr().err
    assert call(tmp_path, SMALL, *data, "--encoder=random:tiny") == 2
    assert "--encoder is given 2 times" in capsys.readouterr().err
    assert call(tmp_path, SMALL, "--data=configs/nothing.py") == 2
    assert "--data=configs/nothing.py: there is no config" in capsys.readouterr().err


def test_images_without_labels_are_refused(tmp_path, capsys):
    root = tmp_path / "flat"
    root.mkdir()
    for index in range(20):
        pixels = np.full((40, 40, 3), index, np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    flags = ["--data=configs/folder.py", f"--data.root={root}", "--data.gsd=1"]
    assert call(tmp_path, SMALL, *flags) == 2
    assert "has 0 class(es)" in capsys.readouterr().err


def test_help(capsys):
    assert knn.main(["knn", "--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("--encoder", "--data", "--scales", "--k", "--temperature", "--gsd"):
        assert flag in printed


def test_signal_stops_it_and_the_same_command_goes_on(tmp_path, data):
    """SIGTERM after some batches; afterwards no image is encoded twice."""
    results, cache = tmp_path / "results.jsonl", tmp_path / "cache"
    code = f"""
import os, signal, sys
from xsmae.cli import knn
from xsmae.evaluation import features, subjects
calls = []
encode = features.image_statistics
def counted(images, gsd):
    calls.append(len(images))
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(images, gsd)
subjects.PIXEL_CONTROLS["statistics"] = (counted, "")
del subjects.PIXEL_CONTROLS["thumbnail"]
status = knn.main(["knn", "--encoder=statistics", "--scales=100", "--batch_size=4",
                   "--results={results}", "--cache={cache}", *{data!r}])
print(len(calls))
sys.exit(status)
"""
    statuses, calls = [], []
    for stop_after in (3, 0):
        done = subprocess.run(
            [sys.executable, "-c", code, str(stop_after)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        statuses.append(done.returncode)
        calls.append(int(done.stdout.splitlines()[-1]))
    assert statuses == [143, 0]
    assert calls == [3, 3]  # six batches of 20 + 4 images
    assert len(read(results)) == 1
