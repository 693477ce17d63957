"""Runs of several processes on this machine, each with its own devices."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.support.runs import ROOT, SMALL_MODEL, SMALL_RUN, comparable, refused
from xsmae.process.files import read_jsonl
from xsmae.process.watchdog import EXIT_STATUS

NUM_STEPS = 60
RUN = [
    "--config=configs/quickstart.py:method=mae",
    *SMALL_RUN,
    f"--config.num_steps={NUM_STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=10",
    "--config.knn.every=30",
    "--config.watchdog_minutes=2",
    "--config.tensorboard=False",
]
GLOO = re.compile(
    r"\[Gloo\]|Rank|is connected to|peer ranks\.?|Expected number of connected|is|:|\d+"
)
# JAX's own watchdog may be the first to see that a process has ended.
ENDED_WITH_THE_OTHER = (EXIT_STATUS, -signal.SIGABRT)


pytestmark = pytest.mark.slow


def on_all_cores():
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count()))


def start(workdir, devices, *arguments, log, run=RUN):
    """Starts a process of the run, on all cores: processes wait for each other."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "xsmae.main", *run, *arguments,
             f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=file,
            stderr=file,
            preexec_fn=on_all_cores,
        )  # fmt: skip


def start_two(workdir, folder, run=RUN):
    """Starts two processes with two devices each; returns them and their logs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    logs = [folder / f"log_{i}" for i in range(2)]
    return [
        start(workdir, 2, *found, f"--process_id={i}", log=log, run=run)
        for i, log in enumerate(logs)
    ], logs


def ends(processes, logs, seconds=300):
    """The exit statuses of all processes."""
    try:
        return [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(log.read_text() for log in logs)) from None
    finally:
        for process in processes:
            process.kill()


def wait_for_step(step, process, log):
    deadline = time.monotonic() + 300
    while not re.search(rf"^step {step}/", log.read_text(), re.MULTILINE):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def assert_near(workdir, other):
    """Rows and weights are the same to rounding."""
    rows, others = comparable(workdir), comparable(other)
    assert len(rows) == len(others)
    for one, two in zip(rows, others, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    ours, theirs = (
        load_file(folder / "encoder/encoder.safetensors") for folder in (workdir, other)
    )
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run of one process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    process = start(folder / "run", 4, log=folder / "log")
    assert ends([process], [folder / "log"]) == [0]
    return folder / "run"


def test_two_processes_of_two_devices_equal_one_of_four(one_process, tmp_path):
    workdir = tmp_path / "run"
    processes, logs = start_two(workdir, tmp_path)
    assert ends(processes, logs) == [0, 0], logs[0].read_text()
    assert_near(workdir, one_process)
    assert f"\nstep {NUM_STEPS}/" in logs[0].read_text()
    # Process 1 repeats no lines. Gloo, which JAX communicates with, writes its own, and
    # those of two threads can be mixed word by word.
    assert GLOO.sub("", logs[1].read_text()).split() == []
    # Both processes report the same metrics; each lists its own images.
    assert comparable(workdir / "process_1") == comparable(workdir)
    assert not (workdir / "process_1/encoder").exists()
    assert not (workdir / "process_1/checkpoints").exists()


def test_one_that_is_killed_ends_the_others_and_the_run_goes_on(one_process, tmp_path):
    workdir = tmp_path / "run"
    processes, logs = start_two(workdir, tmp_path)
    wait_for_step(25, processes[0], logs[0])
    processes[1].kill()
    first, second = ends(processes, logs, 120)
    assert first in ENDED_WITH_THE_OTHER, logs[0].read_text()
    assert second == -signal.SIGKILL
    processes, logs = start_two(workdir, tmp_path)
    assert ends(processes, logs) == [0, 0], logs[0].read_text()
    assert re.search(r"resuming from step (10|20)", logs[0].read_text())
    assert_near(workdir, one_process)


def test_one_that_is_asked_to_stop_stops_all_after_the_same_step(one_process, tmp_path):
    workdir = tmp_path / "run"
    processes, logs = start_two(workdir, tmp_path)
    wait_for_step(12, processes[0], logs[0])
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, logs) == [128 + signal.SIGTERM] * 2, logs[0].read_text()
    steps = [
        read_jsonl(folder / "metrics.jsonl")[-1]["step"]
        for folder in (workdir, workdir / "process_1")
    ]
    assert steps[0] == steps[1] < NUM_STEPS
    assert (workdir / "checkpoints" / str(steps[0])).is_dir()
    processes, logs = start_two(workdir, tmp_path)
    assert ends(processes, logs) == [0, 0], logs[0].read_text()
    assert_near(workdir, one_process)


def run_with_bad_images(folder, *, bad, allowed):
    """The flags of a run on 80 images, `bad` of them broken, one with an odd name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(80 - bad):
        image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(folder / f"{i:02}.png")
    for i in range(bad):
        name = f"{i * 10:02}_bad.png" if i else os.fsdecode(b"no\xffutf8.png")
        (folder / name).write_bytes(b"<html>404</html>")
    return [
        "--config=configs/folder.py:method=mae",
        *SMALL_MODEL,
        f"--config.data.root={folder}",
        "--config.data.gsd=0.5",
        f"--config.input.max_rejected_fraction={allowed}",
        "--config.num_steps=60",
        "--config.optim.warmup_steps=2",
        "--config.log_every=1",
        "--config.watchdog_minutes=2",
        "--config.tensorboard=False",
    ]


def test_bad_images_of_all_processes_together_stop_all(tmp_path):
    """Each process sees about half of them, which alone would be allowed."""
    workdir = tmp_path / "run"
    run = run_with_bad_images(tmp_path / "images", bad=8, allowed=0.08)
    processes, logs = start_two(workdir, tmp_path, run)
    assert ends(processes, logs) == [2, 2], logs[0].read_text()
    counts = []
    for folder, log in zip((workdir, workdir / "process_1"), logs, strict=True):
        assert re.search("of 80 images .* 6 allowed", log.read_text())
        own = len((folder / "rejected.jsonl").read_text().splitlines())
        assert own <= 6.4  # alone, it would have continued
        counts.append(own)
        row = read_jsonl(folder / "metrics.jsonl")[-1]
    assert 6.4 < row["rejected"] == sum(counts)
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
    assert row["step"] in steps  # nothing is lost


def test_one_that_meets_too_many_bad_images_alone_ends_all(tmp_path):
    run = run_with_bad_images(tmp_path / "images", bad=1, allowed=0.0)
    processes, logs = start_two(tmp_path / "run", tmp_path, run)
    statuses = ends(processes, logs, 120)
    assert 2 in statuses
    assert all(status in (2, *ENDED_WITH_THE_OTHER) for status in statuses)
    said = [log.read_text() for log in logs if "of 80 images" in log.read_text()]
    assert len(said) == statuses.count(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--coordinator=localhost:1234"],
        ["--num_processes=2", "--process_id=0"],
        ["--coordinator=localhost", "--num_processes=2", "--process_id=0"],
        ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
        ["--coordinator=localhost:1", "--num_processes=0", "--process_id=0"],
    ],
)
def test_others_that_cannot_be_found(arguments, capsys):
    line = refused(capsys, *RUN, *arguments)
    assert "expected HOST:PORT" in line
