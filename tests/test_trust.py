"""Locks, signals, hangs, non-finite numbers, full disks."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import SMALL_MODEL, SMALL_RUN, call, refused
from xsmae.checkpoints import digests
from xsmae.cli.verify import checkpoints as verify
from xsmae.errors import UserError
from xsmae.process import watchdog
from xsmae.process.files import read_jsonl
from xsmae.process.lock import FolderLock
from xsmae.process.log import shown
from xsmae.process.watchdog import Watchdog
from xsmae.run.metrics import MetricsWriter
from xsmae.run.nonfinite import NonfiniteBatches
from xsmae.run.pictures import Crops, figures
from xsmae.run.workdir import told_in_one_line

ROOT = Path(__file__).parent.parent
SHORT = [
    "--config=configs/quickstart.py:method=mae",
    *SMALL_RUN,
    "--config.knn.every=-1",
    "--config.checkpoint.every=1",
    "--config.num_steps=5",
]


def python(code, *arguments):
    """Starts a process that runs `code`; returns it and its first line of output."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


# One process per workdir

HOLD = """
import sys, time
from pathlib import Path
from xsmae.process.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_told_who_has_the_workdir(tmp_path, capsys):
    process, line = python(HOLD, tmp_path)
    assert line == "held"
    try:
        said = refused(capsys, *SHORT, f"--workdir={tmp_path}")
        assert f"is in use by process {process.pid} on {os.uname().nodename} " in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]
    finally:
        process.kill()
        process.communicate()
    with FolderLock(tmp_path):  # the lock of a dead process is free
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""
    with FolderLock(tmp_path):
        pass


@shown()
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("xsmae.process.lock.fcntl.flock", flock)
    with FolderLock(tmp_path):
        assert "without locks" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write to the workdir"):
        FolderLock(tmp_path / "run").__enter__()


# Signals while Python does not run its own code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once_whatever_runs(number):
    """Both arrive during one C call, so Python's handlers do not run."""
    code = """
import ctypes, signal
from xsmae.process.signals import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)
threads = ctypes.CDLL(None)
with StopRequest():
    print("busy", flush=True)
    # Wait in C for a lock that is never released, without holding the GIL.
    mutex = ctypes.create_string_buffer(64)
    threads.pthread_mutex_lock(mutex)
    threads.pthread_mutex_lock(mutex)
"""
    process, line = python(code)
    assert line == "busy"
    time.sleep(0.2)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert said.splitlines() == [
        f"{name}: stopping after this step; repeat to stop now",
        f"{name}: ending now",
    ]


# Hangs


def test_a_run_that_hangs_is_ended_and_tells_where(tmp_path):
    code = """
import sys, time
from pathlib import Path
from xsmae.process.watchdog import Watchdog
def stuck():
    time.sleep(600)
with Watchdog(Path(sys.argv[1]), minutes=0.02).watching():
    print("watched", flush=True)
    stuck()
"""
    process, _ = python(code, tmp_path / "hang.log")
    _, said = process.communicate(timeout=60)
    assert process.returncode == watchdog.EXIT_STATUS == 75
    assert len(said.splitlines()) == 1
    assert "no step in 0.02 minutes" in said
    assert str(tmp_path / "hang.log") in said
    assert "in stuck" in (tmp_path / "hang.log").read_text()


def test_a_run_that_is_fed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "end_at_once", lambda status: pytest.fail("ended"))
    dog = Watchdog(tmp_path / "hang.log", minutes=0.5 / 60)
    with dog.watching():
        for _ in range(10):
            time.sleep(0.1)
            dog.feed()
    before = threading.active_count()
    with Watchdog(tmp_path / "hang.log", minutes=0).watching():
        assert threading.active_count() == before
    assert not (tmp_path / "hang.log").exists()


def test_a_run_that_was_suspended_goes_on(tmp_path):
    code = """
import sys, time
from pathlib import Path
from xsmae.process.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), minutes=2 / 60)
with dog.watching():
    print("watched", flush=True)
    for _ in range(40):
        dog.feed()
        time.sleep(0.05)
"""
    process, _ = python(code, tmp_path / "hang.log")
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


# Numbers that are not finite


class Named:
    def id(self, index):
        return f"image-{index}"


def test_images_of_batches_that_are_not_finite_are_listed(tmp_path):
    def create(resume_step=None):
        return NonfiniteBatches(tmp_path, Named(), limit=2, resume_step=resume_step)

    def check(batches, step, count):
        metrics = {"nonfinite_in_a_row": np.int32(count)}
        batches.check(metrics, np.array([step, -1, step + 10]), step=step)

    batches = create()
    check(batches, 1, 0)
    assert not batches.path.exists()
    for _ in range(2):  # a saved step is checked twice
        check(batches, 2, 1)
    with pytest.raises(UserError, match=r"nonfinite\.jsonl") as caught:
        check(batches, 3, 2)
    assert "\n" not in str(caught.value)
    rows = read_jsonl(batches.path)
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[1]["ids"] == ["image-3", "image-13"]
    create(resume_step=2)
    assert [row["step"] for row in read_jsonl(batches.path)] == [2]


def test_a_diverging_run_keeps_its_good_checkpoint(tmp_path, capsys):
    """The first update is far too large; the steps after it change nothing."""
    said = refused(
        capsys,
        *SHORT,
        "--config.optim.learning_rate=1e38",
        "--config.optim.warmup_steps=0",
        "--config.optim.max_nonfinite=2",
        f"--workdir={tmp_path}",
    )
    assert "2 steps in a row" in said
    assert str(tmp_path / "nonfinite.jsonl") in said
    rows = read_jsonl(tmp_path / "nonfinite.jsonl")
    assert [len(row["ids"]) for row in rows] == [8, 8]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


# Disks


@shown()
def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, resume_step=None, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    size = writer.path.stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))
        for step in range(2, 40):  # more steps than TensorBoard's queue holds
            writer.write(step, {"loss": 1.0})
        assert writer.path.stat().st_size == size
        assert "metrics.jsonl cannot be written (" in capsys.readouterr().out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    writer.write(40, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_jsonl(writer.path)] == list(range(1, 41))


@shown()
def test_a_run_does_not_wait_for_tensorboard_that_has_ended(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, resume_step=None, tensorboard=True)
    writer.events._get_file_writer().event_writer._worker.stop()
    for step in range(40):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert "TensorBoard's file" in capsys.readouterr().out
    assert len(read_jsonl(writer.path)) == 40


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_outlives_a_disk_that_is_full_for_a_while(tmp_path, capsys, monkeypatch):
    write, left = digests.write, [2]

    def now_and_then(*args):
        if left[0]:
            left[0] -= 1
            no_space()
        write(*args)

    monkeypatch.setattr(digests, "write", now_and_then)
    monkeypatch.setattr(figures, "crops", no_space)
    assert call(*SHORT, f"--workdir={tmp_path}") == 0
    said = capsys.readouterr().out
    assert "step 1 could not be saved" in said
    assert "No space left on device" in said
    assert "the figure of the crops cannot be written" in said
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "4", "5"}
    # The disk stays full: after the allowed failures, one line with the last good step.
    left[0] = 100
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "5")
    none = "--config.checkpoint.keep_going_without_checkpoints=0"
    said = refused(capsys, *SHORT, none, f"--workdir={tmp_path}")
    assert "step 5 could not be saved" in said
    assert "step 4 is saved; the same command resumes" in said


def test_a_run_outlives_images_that_vanish_before_they_are_drawn(
    image_folder, tmp_path, capsys, monkeypatch
):
    draw = Crops.draw

    def vanish(hook, batch):
        for path in image_folder.rglob("*.jpg"):
            path.unlink()
        draw(hook, batch)

    monkeypatch.setattr(Crops, "draw", vanish)
    workdir = tmp_path / "run"
    run = [
        "--config=configs/folder.py:method=mae",
        f"--config.data.root={image_folder}",
        "--config.data.gsd=0.5",
        *SMALL_MODEL,
        "--config.num_steps=1",
        "--config.optim.warmup_steps=0",
        "--config.knn.every=-1",
        f"--workdir={workdir}",
    ]
    assert call(*run) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "cannot be drawn" in line]
    assert [line.partition(" cannot")[0] for line in said] == [
        "the figure of the crops",
        "the reconstructions",
    ]
    assert "2 of 2 images" in said[1]
    names = {path.name for path in (workdir / "figures").iterdir()}
    assert names == {"gsd.png", "losses.png"}
    assert (workdir / "encoder").is_dir()


@pytest.mark.parametrize("damaged", ["2", "3", "5"])
def test_the_same_command_heals_a_run_with_a_damaged_step(tmp_path, damaged, capsys):
    """A step kept by keep_every, one of the newest steps, the newest step."""
    run = [*SHORT, "--config.checkpoint.keep_every=2", f"--workdir={tmp_path}"]
    assert call(*run) == 0
    folder = tmp_path / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    assert names == {"2", "3", "4", "5"}
    (folder / damaged / digests.FILE).write_text("{}")
    assert verify(["xsmae verify", str(tmp_path)]) == 1
    assert call(*run) == 0
    capsys.readouterr()
    assert verify(["xsmae verify", str(tmp_path)]) == 0
    newest = "5"
    assert {path.name for path in folder.iterdir()} == names - {damaged} | {newest}
    assert call(*run) == 0
    assert "is skipped" not in capsys.readouterr().out


def test_what_a_disk_says_is_told_in_one_line(tmp_path):
    said = "cannot write to the workdir"
    with pytest.raises(UserError, match=said), told_in_one_line(tmp_path):
        no_space()
    with pytest.raises(UserError, match="encoder"), told_in_one_line(tmp_path):
        (tmp_path / "gone" / "encoder").write_text("")
    with pytest.raises(FileNotFoundError), told_in_one_line(tmp_path / "run"):
        (tmp_path / "elsewhere").read_text()
