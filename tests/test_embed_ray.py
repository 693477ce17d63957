"""Embeddings on Ray: two nodes, a killed worker, a stop; the bytes of one process."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.encoders import make_encoder
from tests.support.rasters import REASON
from tests.support.scenes import call, contents, loaded, make_scene
from xsmae.cli import embed as command
from xsmae.cli import embed_scenes
from xsmae.data.raster import open_raster
from xsmae.errors import UserError
from xsmae.scenes import embed, strips
from xsmae.scenes.chips import Length
from xsmae.scenes.embed import Plan, job_of
from xsmae.scenes.encoding import Groups
from xsmae.scenes.ray_cluster import ranges
from xsmae.scenes.ray_worker import LAYOUTS, Opening, Work, Worker
from xsmae.scenes.rows import Here
from xsmae.weights.encoder import load_encoder

pytest.importorskip("rasterio", reason=REASON)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder, depth=1, position="gsd", reference_gsd=10.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    truncated = make_scene(folder / "truncated.tif", 200, 200)
    truncated.write_bytes(truncated.read_bytes()[:60_000])
    whole = [make_scene(folder / f"s{i}.tif", 330 + i, 40) for i in range(2)]
    return [*whole, truncated]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART", 5)
    monkeypatch.setattr(embed_scenes, "load_encoder", loaded)


def processes(mark):
    """pid -> command line of the processes with a text in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                text = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = text.decode(errors="replace")
    return found


def start_nodes():
    """The process that holds two nodes, and their address.

    Ray gives up if a node does not start within 30 s, as on a machine that is busy.
    """
    for _ in range(3):
        nodes = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        address = nodes.stdout.readline().strip()
        if address:
            return nodes, address
        reason = nodes.communicate()[1][-500:]
    pytest.fail(f"no cluster: {reason}")


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes, and a text in the environment of their processes."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'xsmae[ray]'")
    # Sockets need a short path. Two clusters at a time would start too slowly.
    folder = tempfile.mkdtemp(prefix="r")
    # Nothing is reported, and no token is written into the home folder.
    ours = {
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        open(Path(tempfile.gettempdir(), "xsmae-test-ray.lock"), "a") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, value in ours.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes, address = start_nodes()
        yield address, folder
        nodes.communicate()
        late = time.monotonic() + 180
        while (left := others(folder)) and time.monotonic() < late:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder)
        assert not left


def others(mark):
    return {p: text for p, text in processes(mark).items() if p != os.getpid()}


def work_of(folder, scene, unit="chip", **changes):
    """Work on all rows of a scene, its layout, and the encoder."""
    encoder = load_encoder(folder)
    plan = Plan(chip_size=Length(16, False), stride=Length(8, False)).of(encoder)
    raster = open_raster(scene)
    layout = LAYOUTS[unit].of(encoder, raster, plan)
    opening = Opening(raster.path, {}, unit, "scene", plan)
    job = job_of(layout, encoder, plan, "scene")
    rows = range(layout.reader.grid.shape[0])
    return Work(opening, job, layout.step, rows), layout, encoder


@pytest.mark.parametrize("unit", ["chip", "token"])
def test_rows_in_any_order_are_those_of_one_process(encoder, scenes, unit, monkeypatch):
    work, layout, loaded = work_of(encoder, scenes[0], unit)
    pooling = "mean" if unit == "chip" else None
    here = Here(Groups(loaded, pooling=pooling, batch_size=64))
    expected = list(
        here.stored(
            layout,
            work.job,
            work.rows,
            progress=lambda done: None,
            should_stop=lambda: False,
        )
    )
    monkeypatch.setattr(embed, "PART", 10**6)  # the worker takes the command's parts
    worker = Worker(str(encoder), "auto", pooling, 64)
    parts = ranges(layout, work.rows, workers=2)
    assert len(parts) > 2
    assert [row for part in parts for row in part] == list(work.rows)
    found = {}
    for part in reversed(parts):
        for rows, stored in worker.stored(dataclasses.replace(work, rows=part)):
            found[rows] = stored
    assert sorted(found, key=min) == [rows for rows, _ in expected]
    for rows, stored in expected:
        for name, values in stored.items():
            np.testing.assert_array_equal(found[rows][name], values)


def test_a_scene_that_a_node_lacks_names_the_node(encoder, tmp_path):
    scene = make_scene(tmp_path / "scene.tif", 40, 40)
    work, _, _ = work_of(encoder, scene)
    worker = Worker(str(encoder), "auto", "mean", 64)
    host = worker.facts().host
    os.utime(scene, (1, 1))
    with pytest.raises(UserError, match=f"another file.*{host}"):
        worker.stored(work)
    scene.unlink()
    with pytest.raises(UserError, match=f"exist.*{host}"):
        worker.stored(work)


def test_without_the_package_a_line_says_what_to_install(
    tmp_path, encoder, scenes, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [scenes[0], f"--encoder={encoder}", f"--out={tmp_path / 'out'}"]
    assert call(*words, "--ray=auto") == 2
    said = capsys.readouterr().err
    assert "pip install 'xsmae[ray]'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_fit_are_refused(tmp_path, encoder, scenes, capsys):
    words = [scenes[0], f"--encoder={encoder}", f"--out={tmp_path / 'out'}"]
    for more, match in (
        (["--ray=auto", "--shard=0/2"], "--shard"),
        (["--ray_workers=2"], "--ray_workers"),
        (["--ray=auto", "--ray_workers=0"], "ray_workers"),
    ):
        assert call(*words, *more) == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1


def test_a_cluster_that_does_not_answer(tmp_path, encoder, scenes, capsys):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'xsmae[ray]'")
    words = [scenes[0], f"--encoder={encoder}", f"--out={tmp_path / 'out'}"]
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "head"):
        assert call(*words, f"--ray={address}") == 2
        said = capsys.readouterr().err
        assert f"--ray={address}" in said
        assert said.count("\n") == 1


def kill_a_worker(monkeypatch, mark):
    """After the first finished rows; returns the list of killed processes."""
    killed = []
    commit = strips.Strips.commit

    def committed(self, next_row):
        commit(self, next_row)
        if not killed:
            workers = [p for p, text in others(mark).items() if "ray::Worker" in text]
            assert len(workers) == 2
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    monkeypatch.setattr(strips.Strips, "commit", committed)
    return killed


@pytest.mark.parametrize("unit", ["chip", "token"])
def test_a_killed_worker_changes_no_byte(
    tmp_path, encoder, scenes, cluster, unit, monkeypatch, capsys
):
    address, mark = cluster
    words = [*scenes, f"--encoder={encoder}", "--chip_size=16", "--stride=4"]
    words.append(f"--unit={unit}")
    assert call(*words, f"--out={tmp_path}/here") == 3
    reasons = [x for x in capsys.readouterr().out.splitlines() if "failed" in x]
    killed = kill_a_worker(monkeypatch, mark)
    assert call(*words, f"--out={tmp_path}/ray", f"--ray={address}") == 3
    said = capsys.readouterr().out.splitlines()
    assert "Ray: 2 workers" in said[0]
    assert len(killed) == 1
    assert any("was lost" in line for line in said)
    assert [line for line in said if "failed" in line] == reasons
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    listed = json.loads((tmp_path / "ray" / "manifest.json").read_text())
    assert listed["scenes"].keys() == {"s0", "s1"}
    assert listed["failed"].keys() == {"truncated"}


def test_a_command_that_is_asked_to_stop_resumes(
    tmp_path, encoder, scenes, cluster, capsys
):
    address, _ = cluster
    words = [str(scenes[0]), f"--encoder={encoder}", "--chip_size=16", "--stride=4"]
    journal = tmp_path / "ray" / ".s0.unfinished" / strips.JOURNAL
    on_ray = [*words, f"--out={tmp_path}/ray", f"--ray={address}"]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        command.embed(["xsmae embed", *on_ray], journal.exists)
    assert signal.getsignal(signal.SIGTERM) == handler  # Ray has one of its own
    assert journal.exists()
    # One process resumes what Ray began.
    assert call(*words, f"--out={tmp_path}/ray") == 0
    assert "resumes at row" in capsys.readouterr().out
    assert call(*words, f"--out={tmp_path}/here") == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
