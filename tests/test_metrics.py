"""The files of a run: numbers, config, environment; and how it stops."""

import json
import math
import os
import platform
import signal
import struct
import sys
import time
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from xsmae.config import flatten
from xsmae.errors import UserError
from xsmae.process import progress
from xsmae.process.files import read_jsonl, write_json
from xsmae.process.log import shown
from xsmae.process.progress import Progress
from xsmae.process.signals import StopRequest
from xsmae.run.metrics import MetricsWriter
from xsmae.run.report import summary
from xsmae.run.workdir import differences, open_workdir

# metrics.jsonl


def write(workdir, steps, *, resume_step=None, tensorboard=False, **values):
    writer = MetricsWriter(workdir, resume_step=resume_step, tensorboard=tensorboard)
    for step in steps:
        writer.write(step, {"loss": 1 / step, **values})
    writer.close()
    return workdir / "metrics.jsonl"


def steps_of(path):
    return [row["step"] for row in read_jsonl(path)]


def test_a_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None, tensorboard=False)
    writer.write(3, {"loss": 0.5, "rejected": 2})
    text = (tmp_path / "metrics.jsonl").read_text()
    writer.close()
    assert json.loads(text) == {"schema": 1, "step": 3, "loss": 0.5, "rejected": 2}
    assert text.endswith("}\n")


def test_resuming_drops_later_lines_and_keeps_earlier(tmp_path):
    path = write(tmp_path, [1, 2, 3, 4])
    before = path.read_text().splitlines()
    write(tmp_path, [3], resume_step=2, note=7.0)
    after = path.read_text().splitlines()
    assert after[:2] == before[:2]
    assert json.loads(after[2])["note"] == 7.0
    assert len(after) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    write(tmp_path, [1, 2])
    assert steps_of(write(tmp_path, [1])) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_has_no_number_for_is_null(tmp_path, value):
    def refuse(constant):
        raise AssertionError(constant)

    line = write(tmp_path, [1], broken=value).read_text()
    assert json.loads(line, parse_constant=refuse)["broken"] is None
    # The mode stays when the file is rewritten on resuming.
    write(tmp_path, [], resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_numbers_of_any_kind_are_taken(tmp_path):
    values = {"a": np.float32(0.5), "b": jnp.array(2.5), "c": np.int64(3), "d": 4}
    (row,) = read_jsonl(write(tmp_path, [1], **values))
    assert [row[name] for name in "abcd"] == [0.5, 2.5, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_written_last_line(tmp_path, cut):
    path = write(tmp_path, [1, 2, 3])
    text = path.read_text()
    path.write_text(text[: len(text) - 1 - cut])
    assert steps_of(path) == [1, 2]
    write(tmp_path, [4], resume_step=3)
    assert steps_of(path) == [1, 2, 4]


@shown()
@pytest.mark.parametrize("damage", [b"\xff", b"}", b'"', b"[]\n", b"null\n"])
def test_a_damaged_line_costs_no_other(tmp_path, damage, capsys):
    path = write(tmp_path, [1, 2, 3])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    whole = damage.endswith(b"\n")
    path.write_bytes(first + (damage if whole else damage + second) + third)
    assert steps_of(path) == [1, 3]
    assert "metrics.jsonl: line 2 is damaged" in capsys.readouterr().out
    write(tmp_path, [4], resume_step=3)
    assert steps_of(path) == [1, 3, 4]


def test_no_file_is_no_lines(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


# TensorBoard and W&B


def read_events(workdir):
    """(step, name, value) of the TFRecords: length, checksum, event, checksum.

    The name START makes TensorBoard drop events of that step and later ones.
    """
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            if event.session_log.status == SessionLog.START:
                found.append((event.step, "START", None))
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, [1, 4], tensorboard=True, broken=math.nan)
    assert read_events(tmp_path) == [
        (0, "START", None),
        (1, "loss", 1.0),
        (4, "loss", 0.25),
    ]


def test_tensorboard_drops_later_steps_on_resuming(tmp_path):
    write(tmp_path, [2], resume_step=1, tensorboard=True)
    assert read_events(tmp_path) == [(2, "START", None), (2, "loss", 0.5)]


def test_no_events_unless_asked_for(tmp_path):
    write(tmp_path, [1])
    assert read_events(tmp_path) == []
    assert not list(tmp_path.glob("events*"))


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb") as caught:
        MetricsWriter(tmp_path, resume_step=None, wandb_config={})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wandb_gets_the_same_numbers(tmp_path, monkeypatch):
    calls, names = [], set()
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )

    def init(**arguments):
        calls.append(arguments["config"])
        names.add(arguments["id"])
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = MetricsWriter(
        tmp_path, resume_step=None, tensorboard=False, wandb_config={"seed": 3}
    )
    writer.write(2, {"loss": 0.5, "broken": math.nan})
    writer.close()
    assert calls == [{"seed": 3}, (2, {"loss": 0.5}), "finish"]
    # A restart continues the same W&B run.
    MetricsWriter(
        tmp_path, resume_step=2, tensorboard=False, wandb_config={"seed": 3}
    ).close()
    assert len(names) == 1


# The progress line


class Clock:
    """A `time.monotonic` that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


VALUES = {
    "loss": 1.5,
    "loss/reconstruction": 1.25,
    "loss/contrastive": 0.25,
    "loss/reconstruction_view1": 9.0,
    "learning_rate": 0.125,
    "epoch": 0.456,
    "images_per_second": 32.4,
}


def test_progress_line(clock):
    progress = Progress(start_step=10, num_steps=2010, batch_size=8)
    clock.now += 40  # 20 steps of 2 s
    assert progress.line(30, VALUES) == (
        "step 30/2010  epoch 0.46  loss 1.5000 (reconstruction 1.2500, "
        "contrastive 0.2500)  32 images/s  1:06:00 left"
    )
    clock.now += 3960
    assert progress.line(2010, VALUES).endswith("0:00:00 left")


def test_the_line_of_a_step_that_compiled_has_no_rate(clock):
    progress = Progress(start_step=0, num_steps=10, batch_size=8)
    line = progress.line(1, {**VALUES, "images_per_second": math.nan})
    assert line.endswith("(reconstruction 1.2500, contrastive 0.2500)  compiled")


def test_rate_is_since_it_was_last_asked(clock):
    progress = Progress(start_step=10, num_steps=100, batch_size=8)
    clock.now += 5
    assert progress.images_per_second(20) == 10 * 8 / 5
    clock.now += 1
    assert progress.images_per_second(21) == 8
    progress.restart(30)
    clock.now += 2
    assert progress.images_per_second(31) == 4


def test_paused_time_does_not_count(clock):
    progress = Progress(start_step=0, num_steps=20, batch_size=8)
    clock.now += 10
    with progress.paused():
        clock.now += 500
    assert progress.line(10, VALUES).endswith("0:00:10 left")
    assert progress.images_per_second(10) == 8
    assert progress.waiting_for_data() == 0


def test_share_of_the_time_that_data_is_waited_for(clock):
    def slow():
        for seconds in (3, 1, 0):
            clock.now += seconds
            yield seconds

    progress = Progress(start_step=0, num_steps=3, batch_size=8)
    batches = progress.receive(slow())
    assert next(batches) == 3
    clock.now += 3
    assert progress.waiting_for_data() == 3 / 6
    assert next(batches) == 1
    with progress.paused():
        clock.now += 500
    clock.now += 1
    assert progress.waiting_for_data() == 1 / 2
    assert next(batches) == 0
    clock.now += 1
    assert progress.waiting_for_data() == 0
    progress.restart(3)
    assert list(batches) == []
    assert progress.waiting_for_data() == 0


# The table at the end


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        (
            [{"loss": 2.0}, {"loss": 1.0, "loss/reconstruction": None}],
            [["loss", "2.0000", "1.0000"], ["loss/reconstruction", "-", "-"]],
        ),
        (
            [{"knn/accuracy_cls": 0.5, "knn/accuracy_mean": 0.25}],
            [
                ["this", "encoder", "50.0", "%", "25.0", "%"],
                ["the", "same", "encoder,", "untrained", "-", "-"],
                ["image", "statistics", "alone", "-"],
            ],
        ),
        (
            [{"knn/random_encoder_cls": 0.5, "knn/image_statistics": 0.125}],
            [
                ["this", "encoder", "-", "-"],
                ["the", "same", "encoder,", "untrained", "50.0", "%", "-"],
                ["image", "statistics", "alone", "12.5", "%"],
            ],
        ),
    ],
)
def test_the_summary_of_rows_that_are_not_all_there(tmp_path, rows, expected):
    text = "".join(json.dumps({"step": 1, **row}) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    lines = [line.split() for line in summary(tmp_path).splitlines()]
    assert [line for line in lines if line in expected] == expected
    assert ["first", "last"] in lines or not any("loss" in row for row in rows)
    assert lines[-1] == ["encoder:", str(tmp_path / "encoder")]


# The workdir


def some_config(**changes):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.area = (0.25, 1.0)
    config.data = {"source": "folder", "root": "/a"}
    config.input = {"num_workers": 0, "num_threads": 4}
    config.model = {"remat": "none"}
    config.checkpoint = {"every": 5}
    config.figures = {"every": 5}
    config.knn = {"every": 5, "batch_size": 256, "full_at_end": True}
    config.log_every = 1
    config.tensorboard = True
    config.update_from_flattened_dict(changes)
    return config


def refused(match, *args):
    with pytest.raises(UserError, match=match) as caught:
        open_workdir(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_workdir_gets_config_and_environment(tmp_path):
    workdir = tmp_path / "deep" / "run"
    open_workdir(workdir, some_config())
    assert sorted(path.name for path in workdir.iterdir()) == [
        "config.json",
        "environment.json",
    ]
    config = json.loads((workdir / "config.json").read_text())
    assert config["area"] == [0.25, 1.0]
    assert config["data"] == {"source": "folder", "root": "/a"}
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["schema"] == 1
    assert environment["python"] == platform.python_version()
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["versions"].keys() >= {"xsmae", "flax", "optax", "grain"}
    assert len(environment["devices"]) == jax.device_count()
    assert environment["command"] == sys.argv
    assert environment["processes"] == 1
    assert environment.keys() >= {"git_revision", "platform", "cpus"}


def begin(workdir):
    """The workdir of a run that has saved a step."""
    open_workdir(workdir, some_config())
    (workdir / "checkpoints" / "5").mkdir(parents=True)


def test_the_same_config_goes_on(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_text()
    open_workdir(tmp_path, some_config())
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("batch_size", 16, "batch_size was 8, is 16"),
        ("area", (0.5, 1.0), r"area was \[0.25, 1.0\], is \[0.5, 1.0\]"),
        ("data.source", "csv", "data.source was 'folder', is 'csv'"),
    ],
)
def test_another_config_is_refused_and_the_field_named(tmp_path, field, value, said):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_text()
    message = refused(said, tmp_path, some_config(**{field: value}))
    assert "--workdir" in message
    assert "seed" not in message
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_without_a_checkpoint_may_change_its_config(tmp_path):
    open_workdir(tmp_path, some_config())
    (tmp_path / "checkpoints").mkdir()
    open_workdir(tmp_path, some_config(batch_size=16))
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16


def test_every_difference_is_named(tmp_path):
    begin(tmp_path)
    changes = {"seed": 1, "batch_size": 4, "input.num_workers": 2}
    message = refused(
        "batch_size was 8, is 4; seed was 0", tmp_path, some_config(**changes)
    )
    assert "num_workers" not in message


def test_free_fields_may_change(tmp_path):
    begin(tmp_path)
    changes = {
        "input.num_workers": 2,
        "input.num_threads": 1,
        "data.root": "/elsewhere",
        "checkpoint.every": 7,
        "figures.every": 0,
        "model.remat": "full",
        "log_every": 9,
        "tensorboard": False,
        "knn.every": -1,
        "knn.batch_size": 64,
        "knn.full_at_end": False,
    }
    open_workdir(tmp_path, some_config(**changes))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["root"] == "/elsewhere"


@pytest.mark.parametrize(
    "name",
    [
        "meshes", "mesh.shape", "log_every_epoch", "data.roots", "input.prefetch_size",
        "checkpoint", "knn.k", "knn.temperature", "knn.max_train", "knn.max_test",
        "knn.train.split", "knn.test.split", "knn.every_epoch",
    ],
)  # fmt: skip
def test_fields_whose_names_begin_like_free_ones_are_not_free(name):
    assert differences({name: 1}, {name: 2}) == [f"{name} was 1, is 2"]


def test_fields_that_come_or_go_are_differences():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}
    assert differences(old, new) == ["a.c was 2, is None", "d was None, is 3"]
    assert flatten(old) == {"a.b": 1, "a.c": 2}


@pytest.mark.parametrize("content", [b"", b'{"seed": 0,', b"\xff\xfe"])
def test_broken_config(tmp_path, content):
    begin(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    message = refused("is not JSON", tmp_path, some_config())
    assert str(tmp_path / "config.json") in message


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    refused("cannot write to the workdir .*run: ", tmp_path / "run", some_config())
    refused("Not a directory", tmp_path / "run" / "deeper", some_config())


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# Stopping


@pytest.fixture
def handler():
    """A SIGTERM handler that records the signals it receives."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(1))
    yield received
    signal.signal(signal.SIGTERM, previous)


def test_the_first_signal_is_noted_and_the_second_acts(handler, capfd):
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert stop.signal == signal.SIGTERM
        assert handler == []
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert handler == [1]
    assert capfd.readouterr().err.startswith("SIGTERM: stopping after this step")


def test_interrupt_is_noted_then_raises():
    # A shell's background jobs begin with SIGINT ignored; a terminal's do not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_before_afterwards(handler):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)
    assert handler == [1]
