"""Maps of scenes: the pixels, the files, kills, and what is refused."""

import json
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import xsmae
from tests.support.encoders import tiny_encoder
from tests.support.rasters import REASON, UTM, north_up, write
from xsmae import cli
from xsmae.cli import predict as command
from xsmae.data.raster import open_raster
from xsmae.errors import UserError
from xsmae.evaluation.segmentation.windows import Readable, segment, window_weights
from xsmae.models.pixel_linear import PixelLinear
from xsmae.scenes import maps, strips
from xsmae.scenes.maps import Outputs, map_scene
from xsmae.weights.head import load_head, save_head

rasterio = pytest.importorskip("rasterio", reason=REASON)

HEIGHT, WIDTH, CROP, OVERLAP = 150, 130, 32, 8
CLASSES = ("roof & yard", "road", "tree")
RECIPE = {"batch_norm_epsilon": 1e-6, "crop": CROP, "overlap": OVERLAP}


def make_head(folder, *, seed=0, colours=((200, 0, 0), (90, 90, 90), (0, 150, 0))):
    """A linear head with random weights."""
    model = PixelLinear(
        16, 3, momentum=0.1, epsilon=1e-6, head_std=1.0, rngs=nnx.Rngs(seed)
    )
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    state = SimpleNamespace(params=params, batch_stats=batch_stats)
    save_head(
        folder, tiny_encoder(depth=1), state, kind="linear", classes=CLASSES,
        colours=colours, recipe=RECIPE, training={},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("head"))


def make_scene(path, height=HEIGHT, width=WIDTH, **options):
    rng = np.random.default_rng(0)
    squares = rng.integers(1, 256, (3, -(-height // 10), -(-width // 10)))
    data = np.kron(squares, np.ones((1, 10, 10)))[:, :height, :width].astype(np.uint8)
    data[:, 40:60, 100:] = 0
    return write(path, data, **{"photometric": "rgb", "nodata": 0, **options})


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scenes") / "scene.tif")


def predict(*words):
    return cli.main(["xsmae", "predict", *map(str, words)])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def brute_force(head, raster):
    """Scores by a window at a time, on a whole canvas."""
    values, valid = raster.read((0, 0, *raster.shape))
    values = np.where(valid[..., None], values, np.float32(head.encoder.bands.mean))
    starts = [
        [*range(0, side - CROP, CROP - OVERLAP), side - CROP] for side in raster.shape
    ]
    total = np.zeros((*raster.shape, len(CLASSES)))
    weight = np.zeros((*raster.shape, 1))
    profile = window_weights(CROP, OVERLAP).astype(float)
    blend = np.outer(profile, profile)[..., None]
    for top in starts[0]:
        for left in starts[1]:
            part = np.s_[top : top + CROP, left : left + CROP]
            found = head.predict(values[part][None], gsd=[raster.gsd])[0]
            total[part] += blend * np.asarray(found, float)
            weight[part] += blend
    return total / weight, valid


def test_a_map_equals_brute_force(tmp_path, head, scene, capsys):
    out = tmp_path / "out"
    assert predict(scene, f"--head={head}", f"--out={out}", "--probabilities") == 0
    with open_raster(scene) as raster:
        scores, valid = brute_force(load_head(head), raster)
    ordered = np.sort(scores, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 1e-3
    assert clear.mean() > 0.99
    assert 0 < valid.mean() < 1
    with rasterio.open(scene) as given, rasterio.open(out / "scene_classes.tif") as got:
        classes = got.read(1)
        assert got.crs == given.crs
        assert got.transform == given.transform
        assert got.nodata == 255
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert got.tags()["CLASS_0"] == "roof & yard"
        assert got.colormap(1)[0] == (200, 0, 0, 255)
        assert got.colormap(1)[255][3] == 0
    np.testing.assert_array_equal(classes == 255, ~valid)
    assert len(np.unique(classes[valid])) == 3
    chosen = clear & valid
    np.testing.assert_array_equal(classes[chosen], scores.argmax(axis=-1)[chosen])
    shares = np.asarray(jax.nn.softmax(scores, axis=-1))
    with rasterio.open(out / "scene_probabilities.tif") as got:
        assert got.descriptions == CLASSES
        assert got.transform == rasterio.Affine(*UTM)
        found = got.read().transpose(1, 2, 0)
        np.testing.assert_allclose(
            found[valid] * got.scales[0], shares[valid], atol=0.6 / 254 + 1e-4
        )
    assert (found[~valid] == 255).all()
    assert "roof &amp; yard" in (out / "scene_classes.tif.aux.xml").read_text()
    assert (out / "scene_overlay.png").read_bytes()[1:4] == b"PNG"
    assert len(contents(out)) == 4
    before = contents(out)
    capsys.readouterr()
    # Statistics of another program beside the scene do not matter.
    scene.with_name("scene.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    assert predict(scene, f"--head={head}", f"--out={out}") == 0
    assert "was there" in capsys.readouterr().out
    assert contents(out) == before


class Killed(BaseException):
    pass


def run_killed(monkeypatch, head, scene, out, name, number):
    """Calls `map_scene`; raises in the `number`th call of a function, before it."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    home, attribute = name
    function = getattr(home, attribute)
    with monkeypatch.context() as patch, open_raster(scene) as raster:
        patch.setattr(home, attribute, counted)
        map_scene(head, raster, Outputs(out, "scene"), probabilities=True, batch_size=3)


def test_python_writes_the_map_of_the_command(tmp_path, head, scene, capsys):
    assert predict(scene, f"--head={head}", f"--out={tmp_path}/command") == 0
    capsys.readouterr()
    outputs = xsmae.map_scene(head, scene, tmp_path / "file", progress=False)
    assert capsys.readouterr().out == ""
    with xsmae.open_raster(scene) as raster:
        loaded = xsmae.load_head(head)
        xsmae.map_scene(loaded, raster, tmp_path / "opened")
        named = xsmae.map_scene(loaded, raster, tmp_path / "opened", name="other")
    assert named.classes == tmp_path / "opened" / "other_classes.tif"
    expected = contents(tmp_path / "command")
    assert contents(tmp_path / "file") == expected
    assert contents(tmp_path / "opened").items() > expected.items()
    assert outputs.overlay.read_bytes() == expected["scene_overlay.png"]
    with pytest.raises(UserError, match="batch_size=0"):
        xsmae.map_scene(loaded, scene, tmp_path, batch_size=0)


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    tmp_path, head, scene, monkeypatch
):
    head = load_head(head)
    windows = []
    plain = head.predict
    head.predict = lambda images, gsd: windows.append(1) or plain(images, gsd=gsd)
    journal, picture = (strips, "write_json"), (maps, "map_overlay")
    run_killed(monkeypatch, head, scene, tmp_path / "whole", journal, 0)
    expected, whole = contents(tmp_path / "whole"), len(windows)
    assert len(expected) == 4
    for number, name in [*((n, journal) for n in (1, 2, 3, 6)), (1, picture)]:
        out = tmp_path / f"{name[1]}_{number}"
        with pytest.raises(Killed):
            run_killed(monkeypatch, head, scene, out, name, number)
        assert not (out / "scene_classes.tif").exists()
        windows.clear()
        run_killed(monkeypatch, head, scene, out, journal, 0)
        assert contents(out) == expected
        # The second strip needs windows that begin in the first one.
        again = len(windows) == whole
        assert again == (name == journal and number <= 2)
    assert windows == []  # all rows were there, only the picture was missing


KILLED = """
import os, signal, sys
from xsmae import cli
from xsmae.scenes import strips

calls, write = [], strips.write_json

def killed(*args):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)

strips.write_json = killed
cli.main(["xsmae", "predict", *sys.argv[1:]])
"""


def test_sigkill(tmp_path, head, scene):
    words = [str(scene), f"--head={head}", f"--out={tmp_path}/out"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words])
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".scene.unfinished"]
    assert predict(*words) == 0
    assert predict(scene, f"--head={head}", f"--out={tmp_path}/whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_command_that_is_asked_to_stop_resumes(tmp_path, head, scene, capsys):
    second = make_scene(tmp_path / "second.tif", 40, 40)
    words = [str(scene), str(second), f"--head={head}"]
    asked = []
    with pytest.raises(KeyboardInterrupt):
        command.predict(
            ["xsmae predict", *words, f"--out={tmp_path}/out"],
            lambda: asked.append(1) or len(asked) > 2,
        )
    journal = tmp_path / "out" / ".scene.unfinished" / "journal.json"
    assert json.loads(journal.read_text())["next_row"] == 2 * (CROP - OVERLAP)
    with pytest.raises(KeyboardInterrupt):  # between two scenes
        command.predict(
            ["xsmae predict", *words, f"--out={tmp_path}/other"],
            lambda: True,
        )
    assert predict(*words, f"--out={tmp_path}/out") == 0
    assert f"row {2 * (CROP - OVERLAP)} of {HEIGHT}" in capsys.readouterr().out
    assert predict(*words, f"--out={tmp_path}/whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_journal_and_another_head_start_anew(
    tmp_path, head, scene, monkeypatch
):
    out = tmp_path / "out"
    first, other = load_head(head), load_head(make_head(tmp_path / "other", seed=1))
    run_killed(monkeypatch, first, scene, tmp_path / "whole", (maps, "map_overlay"), 0)
    expected = contents(tmp_path / "whole")
    commit = (strips, "write_json")
    with pytest.raises(Killed):
        run_killed(monkeypatch, other, scene, out, commit, 4)
    run_killed(monkeypatch, first, scene, out, commit, 0)
    assert contents(out) == expected
    for damage in ("{", json.dumps({"job": 1})):
        out = tmp_path / f"damaged_{len(damage)}"
        with pytest.raises(Killed):
            run_killed(monkeypatch, first, scene, out, commit, 4)
        (out / ".scene.unfinished" / "journal.json").write_text(damage)
        run_killed(monkeypatch, first, scene, out, commit, 0)
        assert contents(out) == expected


def test_strips_from_a_start_are_the_same_in_the_same_batches():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(70, 45, 2)).astype(np.float32)

    def scores(images, gsd):  # a window's scores depend on its whole batch
        return images + np.float32(0.1) * images.mean()

    def strips(start):
        read = Readable.of(image, (1.0, 1.0))
        options = {"crop": 16, "overlap": 10, "batch_size": 4}
        scene = Readable(70, 45, (1.0, 1.0), read.read, start=start)
        return list(segment([scene], scores, **options))

    whole = strips(0)
    assert len(whole) == 10
    for number, first in enumerate(whole):
        later = strips(first.top)
        assert [strip.top for strip in later] == [s.top for s in whole[number:]]
        for a, b in zip(later, whole[number:], strict=True):
            np.testing.assert_array_equal(a.scores, b.scores)


def test_memory_does_not_grow_with_the_height(tmp_path, head, monkeypatch):
    head = load_head(head)
    scores = np.zeros((8, CROP, CROP, 3), np.float32)
    head.predict = lambda images, gsd: scores
    monkeypatch.setattr(maps, "map_overlay", lambda path, *_, **__: path.touch())
    peaks = []
    for height in (512, 512, 2048):  # the first one imports
        name = f"{height}_{len(peaks)}"
        path = make_scene(tmp_path / f"{name}.tif", height, 128)
        with open_raster(path) as raster:
            tracemalloc.start()
            map_scene(head, raster, Outputs(tmp_path, name), probabilities=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # The scores alone would take 12 bytes for each pixel more.
    assert peaks[2] - peaks[1] < (2048 - 512) * 128


def test_windows_have_the_gsd_of_their_place(tmp_path, head):
    place = {"crs": "EPSG:4326", "transform": north_up(10, 65, 0.05)}
    path = make_scene(tmp_path / "degrees.tif", 150, 60, **place)
    head, told = load_head(head), []
    plain = head.predict
    head.predict = lambda images, gsd: told.append(gsd) or plain(images, gsd=gsd)
    with open_raster(path) as raster:
        map_scene(head, raster, Outputs(tmp_path, "degrees"), batch_size=1)
        centre = raster.gsd
    told = np.concatenate(told)
    # From 65 to 57.5 degrees north: the east-west GSD follows the cosine.
    assert told[0, 1] == pytest.approx(0.05 * 111_320 * np.cos(np.radians(64.2)), 0.01)
    assert told[-1, 1] == pytest.approx(0.05 * 111_320 * np.cos(np.radians(58.3)), 0.01)
    np.testing.assert_allclose(told[:, 0], centre[0], rtol=0.01)


def test_scenes_that_fail_are_named_and_the_others_are_mapped(
    tmp_path, head, scene, capsys
):
    grey = write(tmp_path / "grey.tif", np.ones((1, 40, 40), np.uint8))
    nowhere = make_scene(tmp_path / "nowhere.tif", 40, 40, crs=None)
    (tmp_path / "text.tif").write_text("no raster")
    wrong = [grey, nowhere, tmp_path / "text.tif", tmp_path / "missing.tif"]
    out = tmp_path / "out"
    status = predict(*wrong, scene, f"--head={head}", f"--out={out}")
    assert status == 3
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == 4
    for line, path, word in zip(
        failed, wrong, ("band_1", "gsd", "text.tif", "does not exist"), strict=True
    ):
        assert str(path) in line
        assert word in line
    assert lines[-1] == "4 of 5 scenes failed"
    assert {p.name for p in out.iterdir()} == {
        "scene_classes.tif", "scene_classes.tif.aux.xml", "scene_overlay.png",
    }  # fmt: skip


def test_commands_that_cannot_work_are_refused(tmp_path, head, scene, capsys):
    same = make_scene(tmp_path / scene.name, 40, 40)
    for words, match in (
        ([scene], "--head"),
        ([f"--head={head}"], "scene"),
        ([scene, same, f"--head={head}"], str(same)),
        ([scene, f"--head={tmp_path}"], "head.json"),
        ([scene, f"--head={head}", "--batch_size=0"], "batch_size"),
        (["--data=folder", f"--head={head}"], "--data is for heads that label"),
        ([scene, f"--head={head}", "--gsd_csv=a.csv"], "--gsd_csv is for heads that"),
    ):
        assert predict(*words, f"--out={tmp_path}/out") == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_map_of_another_head_stays(tmp_path, head):
    out = Outputs(tmp_path / "out", "small")
    path = make_scene(tmp_path / "small.tif", 40, 40)
    with open_raster(path) as raster:
        map_scene(load_head(head), raster, out)
        before = contents(out.folder)
        other = load_head(make_head(tmp_path / "other", seed=1))
        with pytest.raises(UserError, match="another head"):
            map_scene(other, raster, out)
    assert contents(out.folder) == before


def test_other_units_are_refused(tmp_path, head):
    path = write(
        tmp_path / "reflectance.tif", np.ones((3, 40, 40), np.uint16),
        descriptions=("red", "green", "blue"),
    )  # fmt: skip
    with (
        open_raster(path, scale=1e-4) as raster,
        pytest.raises(UserError, match="uint16"),
    ):
        map_scene(load_head(head), raster, Outputs(tmp_path, "reflectance"))
