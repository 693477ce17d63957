"""Hooks of a run: order, time, evaluators, profiles."""

import json
import textwrap
import types

import jax
import numpy as np
import pytest

from tests.support.runs import SMALL_RUN, call, comparable, refused
from xsmae.process.files import read_jsonl
from xsmae.process.log import shown
from xsmae.process.progress import Progress
from xsmae.run import hooks
from xsmae.run.hooks import Done, Hook, Profile, call_due, due_every
from xsmae.trainer import first_samples

RUN = [
    "--config=configs/quickstart.py:method=mae",
    *SMALL_RUN,
    "--config.knn.every=-1",
    "--config.num_steps=4",
    "--config.tensorboard=False",
]


def test_hooks_that_are_due_are_called_in_order_and_the_time_of_some_is_left_out(
    monkeypatch,
):
    now, called = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(start_step=0, num_steps=10, batch_size=8)

    class Slow(Hook):
        def due(self, step):
            return self.steps is None or step in self.steps

        def __call__(self, done):
            called.append((self.name, done.step))
            now[0] += 4

    def slow(name, *, timed, steps=None):
        hook = Slow(types.SimpleNamespace(progress=progress))
        hook.name, hook.timed, hook.steps = name, timed, steps
        return hook

    several = [
        slow("log", timed=True),
        slow("kNN", timed=False),
        slow("picture", timed=False, steps=(2,)),
    ]
    for step in (1, 2):
        call_due(several, Done(step, None, {}, {}, 0))
    assert called == [
        ("log", 1), ("kNN", 1), ("log", 2), ("kNN", 2), ("picture", 2)
    ]  # fmt: skip
    assert progress.images_per_second(2) == pytest.approx(2 * 8 / (2 * 4))


def test_a_new_evaluator_is_the_class_that_the_docstring_shows(tmp_path, monkeypatch):
    names = {"Hook": Hook, "due_every": due_every, "np": np}
    example = hooks.__doc__[hooks.__doc__.index("    class") :].partition("\nIts ")[0]
    exec(textwrap.dedent(example), names | {"first_samples": first_samples}, names)
    monkeypatch.setattr("xsmae.train.Crops", names["FeatureNorm"])
    assert call(*RUN, f"--workdir={tmp_path}") == 0
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    (row,) = (row for row in rows if "feature_norm" in row)
    assert row["step"] == 4
    assert row["feature_norm"] > 0


def test_the_encoder_is_written_before_the_last_knn(tmp_path, monkeypatch):
    """A last kNN that is stopped leaves an encoder, one that ends adds its results."""
    run = [*RUN, "--config.knn.every=0", "--config.knn.max_test=10"]
    run += [f"--workdir={tmp_path}"]

    def tested():
        described = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
        return described["run"]["knn"]["test_images"]

    def stopped(self, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("xsmae.run.knn.Knn.end", stopped)
        assert call(*run) == 130
    assert tested() == 10
    assert call(*run) == 0
    assert tested() == 20


# Profiles


def test_a_profile_of_some_steps_is_written_once(tmp_path, capsys):
    workdir = tmp_path / "run"
    profile = ["--config.profile=(2, 3)", f"--workdir={workdir}"]
    assert call(*RUN, *profile) == 0
    (trace,) = workdir.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert trace.stat().st_size > 1000
    (said,) = (x for x in capsys.readouterr().out.splitlines() if "the profile" in x)
    assert f"from step 2 is in {workdir / 'profile'}" in said
    assert call(*RUN, *profile) == 0  # the run is already past these steps
    assert call(*RUN, f"--workdir={workdir}") == 0
    assert "the profile" not in capsys.readouterr().out
    assert len(list(workdir.glob("profile/plugins/profile/*"))) == 1
    assert call(*RUN, f"--workdir={tmp_path / 'other'}") == 0
    assert comparable(workdir) == comparable(tmp_path / "other")
    assert not (tmp_path / "other" / "profile").exists()


@pytest.fixture
def traced(monkeypatch):
    """The calls to jax's profiler, and the step after which they happen."""
    asked = []
    for name in ("start", "stop"):
        monkeypatch.setattr(
            jax.profiler,
            f"{name}_trace",
            lambda *folder, name=name: asked.append((name, traced_run.step)),
        )
    traced_run.step = None
    return asked


def traced_run(tmp_path, profile, *, start=0, num_steps=8, stop=None):
    """Call the hook like the loop of a run that starts after `start`."""
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(profile=profile),
        workdir=tmp_path,
        start=start,
        num_steps=num_steps,
        progress=Progress(start_step=start, num_steps=num_steps, batch_size=8),
    )
    hook = Profile(run)
    traced_run.step = start
    hook.begin(None)
    for step in range(start + 1, (stop or num_steps) + 1):
        traced_run.step = step
        call_due([hook], Done(step, None, {}, {"loss": np.float32(1)}, 0))
    traced_run.step = "close"
    hook.close()


@pytest.mark.parametrize(
    ("profile", "options", "expected"),
    [
        ((), {}, []),
        ((3, 5), {}, [("start", 2), ("stop", 5)]),
        ((1, 1), {}, [("start", 0), ("stop", 1)]),
        ((4, 4), {}, [("start", 3), ("stop", 4)]),
        ((8, 8), {}, [("start", 7), ("stop", 8)]),
        ((7, 20), {}, [("start", 6), ("stop", 8)]),
        ((9, 20), {}, []),
        ((3, 6), {"stop": 4}, [("start", 2), ("stop", "close")]),
        ((3, 6), {"stop": 2}, [("start", 2), ("stop", "close")]),
        ((3, 6), {"start": 2}, [("start", 2), ("stop", 6)]),
        ((3, 6), {"start": 4}, [("start", 4), ("stop", 6)]),
        ((3, 6), {"start": 5}, [("start", 5), ("stop", 6)]),
        ((3, 6), {"start": 6}, []),
        ((3, 9), {"start": 8}, []),
    ],
)
@shown()
def test_which_steps_are_profiled(profile, options, expected, traced, tmp_path, capsys):
    traced_run(tmp_path, profile, **options)
    assert traced == expected
    lines = capsys.readouterr().out.splitlines()
    if profile == (9, 20):
        line = lines.pop()
        assert "step 9" in line
        assert "step 8" in line
    assert len(lines) == len(expected) // 2


@shown()
def test_a_run_goes_on_without_a_profile(traced, tmp_path, monkeypatch, capsys):
    def fail(*folder):
        raise RuntimeError("Profile has already been started.")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    traced_run(tmp_path, (3, 5))
    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    traced_run(tmp_path, (3, 5))
    line = "no profile is written (Profile has already been started.)"
    assert capsys.readouterr().out.splitlines() == [line] * 2
    assert traced == [("start", 2)]


@pytest.mark.parametrize("steps", ["(0, 3)", "(5, 3)", "(5,)", "(1, 2, 3)", "(1.5, 2)"])
def test_steps_to_profile_that_are_refused(steps, tmp_path, capsys):
    line = refused(capsys, *RUN, f"--config.profile={steps}", f"--workdir={tmp_path}/r")
    assert f"profile={steps}, expected " in line
    assert not (tmp_path / "r").exists()
