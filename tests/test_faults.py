"""Killed and resumed runs end like an uninterrupted one: `make test-faults`."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.support.runs import ROOT, SMALL_RUN, comparable
from xsmae.cli.verify import checkpoints
from xsmae.process.files import read_jsonl

KILLS = 20
NUM_STEPS = 600
RUN = [
    sys.executable,
    "-m",
    "xsmae.main",
    "--config=configs/quickstart.py:method=mae",
    *SMALL_RUN,
    f"--config.num_steps={NUM_STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=10",
    "--config.knn.every=150",
    "--config.tensorboard=False",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert subprocess.run(command(workdir), cwd=ROOT).returncode == 0
    return workdir


def command(workdir):
    return [*RUN, f"--workdir={workdir}"]


def steps_saved(workdir):
    names = (path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
    return [int(name) for name in names if name.isdigit()]


def last_step(workdir):
    rows = read_jsonl(workdir / "metrics.jsonl")
    return max((row["step"] for row in rows if "loss" in row), default=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments_a_run_ends_as_the_other(
    number, uninterrupted, tmp_path, capsys
):
    """SIGKILL loses nothing beyond the last save, SIGTERM nothing at all."""
    rng, workdir = random.Random(int(number)), tmp_path / "killed"
    log, kills = tmp_path / "log", 0
    while kills < KILLS:
        newest, seen = max(steps_saved(workdir), default=0), last_step(workdir)
        with log.open("w") as file:
            process = subprocess.Popen(
                command(workdir), cwd=ROOT, stdout=file, stderr=file
            )
        try:
            if kills % 4 == 3:  # during start, restore or compilation
                wait_in_the_start(rng.uniform(0, 8), log)
            else:
                wait_for_step(newest + rng.randint(1, 25), process, log)
                time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, log.read_text()
            process.send_signal(number)
            status = process.wait(120)
        finally:
            process.kill()
        kills += 1
        printed = log.read_text()
        begun = re.search(r"resuming from step (\d+)", printed)
        if begun:  # otherwise it was killed before this line
            assert int(begun[1]) == newest
        if number == signal.SIGKILL:
            assert status == -number
            continue
        assert status in (128 + number, -number), printed
        if "stopped; the same command resumes" in printed:
            assert status == 128 + number
            # All finished steps are saved; the last row is for the saved step.
            assert max(steps_saved(workdir), default=0) == last_step(workdir) >= seen
    assert subprocess.run(command(workdir), cwd=ROOT).returncode == 0
    assert comparable(workdir) == comparable(uninterrupted)
    ours, theirs = (
        (folder / "encoder" / "encoder.safetensors").read_bytes()
        for folder in (workdir, uninterrupted)
    )
    assert ours == theirs
    assert checkpoints(["xsmae-checkpoints", "verify", str(workdir)]) == 0
    with capsys.disabled():
        print(f"{kills} times {number.name}: equal metrics, equal encoder")


def wait_in_the_start(seconds, log):
    """Waits for `seconds`, or until the first step if that is sooner."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and "\nstep " not in log.read_text():
        time.sleep(0.02)


def wait_for_step(step, process, log):
    deadline = time.monotonic() + 600
    while True:
        steps = re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)
        if steps and int(steps[-1]) >= step:
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
