"""Checkpoints: damage is detected, older steps are used, full disks lose nothing."""

import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.multihost import multihost

from tests.support.states import some_state
from xsmae.checkpoints import Checkpoints, digests, store
from xsmae.checkpoints.saving import Saver
from xsmae.checkpoints.step import check_files, create_handler, verify
from xsmae.cli.verify import checkpoints as main
from xsmae.errors import DamagedError, SaveError, UserError
from xsmae.process.log import shown

ROOT = Path(__file__).parent.parent
FLIPS = 100


def saved(directory, steps, **options):
    """Saves checkpoints of `steps`."""
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, some_state(step), fingerprint="data")
    checkpoints.wait()
    return checkpoints


def bits(state):
    return {
        name: (leaf.dtype, leaf.array.shape, leaf.array.tobytes())
        for name, leaf in digests.to_host(state).items()
    }


def refused(call, error=UserError):
    """The one-line message of an error."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Undamaged checkpoints


def test_what_is_restored_is_what_was_saved(tmp_path):
    checkpoints = saved(tmp_path, [4])
    step, state = checkpoints.restore_newest(some_state(0), fingerprint="data")
    assert step == 4
    assert bits(state) == bits(some_state(4))
    like = {"params": some_state(0).params, "batch_stats": some_state(0).batch_stats}
    weights = checkpoints.restore_weights(like)
    assert bits(weights) == bits({n: getattr(some_state(4), n) for n in like})
    checkpoints.close()
    content = json.loads((tmp_path / "4" / digests.FILE).read_text())
    assert content["position"] == {"schema": 2, "batches": 4, "source": "data"}
    assert content["leaves"]["key"]["dtype"] == "key<fry>"
    assert content["leaves"]["params.norm.scale"]["dtype"] == "bfloat16"
    names = {str(path.relative_to(tmp_path / "4")) for path in files_of(tmp_path / "4")}
    assert content["files"].keys() == names - {digests.FILE}


def test_the_next_step_does_not_reach_into_a_save(tmp_path):
    """A step reuses the memory of its state while a save runs in the background."""
    state = some_state(1)
    expected = bits(state)
    checkpoints = Checkpoints(tmp_path)
    double = jax.jit(
        lambda s: dataclasses.replace(
            s, params=jax.tree.map(lambda x: x * 2, s.params)
        ),
        donate_argnums=0,
    )
    checkpoints.save(1, state, fingerprint="data")
    double(state)
    checkpoints.wait()
    assert bits(checkpoints.restore(1, some_state(0), fingerprint=None)) == expected
    checkpoints.close()


def test_the_newest_and_every_so_many_are_kept(tmp_path):
    saved(tmp_path, range(1, 8), keep=2, keep_every=3).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]


def test_other_data_and_other_arrays_are_refused_by_name(tmp_path):
    checkpoints = saved(tmp_path, [1])
    newest = checkpoints.restore_newest
    assert "fingerprint data, found other" in refused(
        lambda: newest(some_state(0), fingerprint="other")
    )
    params = {**some_state(0).params, "kernel": jnp.zeros((40, 31))}
    like = some_state(0, params=params)
    said = refused(lambda: newest(like, fingerprint="data"))
    assert "params.kernel: expected float32[40, 31], found float32[40, 30]" in said
    params = {**params, "kernel": jnp.zeros((40, 30), jnp.bfloat16)}
    like = some_state(0, params=params)
    said = refused(lambda: newest(like, fingerprint="data"))
    assert "params.kernel: expected bfloat16[40, 30], found float32[40, 30]" in said
    del params["kernel"]
    like = some_state(0, params=params)
    said = refused(lambda: newest(like, fingerprint="data"))
    assert "params.kernel: expected nothing, found float32[40, 30]" in said
    checkpoints.close()


# Damaged checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    saved(directory, [3, 6]).close()
    return directory


def test_every_flipped_bit_is_noticed_and_the_older_step_used(two_steps, tmp_path):
    """Flips bits anywhere in the files of a step."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    files = files_of(tmp_path / "6")
    lengths = [8 * path.stat().st_size for path in files]
    rng, expected = random.Random(0), bits(some_state(3))
    said, hit = [], set()
    checkpoints = Checkpoints(tmp_path, say=said.append)
    for number in range(FLIPS):
        # Choose half of the files by size and half in turn, so that Orbax's small
        # files, whose number varies, are hit too.
        path = files[number // 2 % len(files)]
        if number % 2:
            (path,) = rng.choices(files, lengths)
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        step, state = checkpoints.restore_newest(some_state(0), fingerprint="data")
        assert step == 3, (path, bit)
        assert bits(state) == expected, (path, bit)
        flip(path, bit)
        hit.add(path)
    checkpoints.close()
    assert len(said) == FLIPS
    assert all(line.startswith("step 6 is skipped: ") for line in said)
    assert not any("\n" in line for line in said)
    assert len(hit) == len(files)
    step, state = saved(tmp_path, []).restore_newest(some_state(0), fingerprint="data")
    assert step == 6


@shown()
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "no digests", "renamed"])
def test_a_step_that_is_not_whole_is_passed_over(two_steps, tmp_path, damage, capsys):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    largest = max(files_of(tmp_path / "6"), key=lambda path: path.stat().st_size)
    expected = f"{largest.relative_to(tmp_path / '6')}"
    if damage == "cut":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "gone":
        largest.unlink()
    elif damage == "empty":
        largest.write_bytes(b"")
    elif damage == "no digests":
        (tmp_path / "6" / digests.FILE).unlink()
        expected = "digests.json is missing"
    else:
        (tmp_path / "6").rename(tmp_path / "7")
        expected = "it contains step 6"
    checkpoints = Checkpoints(tmp_path)
    step, _ = checkpoints.restore_newest(some_state(0), fingerprint="data")
    assert step == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "is skipped" in line
    assert expected in line
    newest = max(checkpoints.steps())
    assert checkpoints.latest_step() == 3
    assert expected in refused(
        lambda: checkpoints.restore(newest, some_state(0), fingerprint=None),
        DamagedError,
    )
    like = {"params": some_state(0).params, "batch_stats": some_state(0).batch_stats}
    assert bits(checkpoints.restore_weights(like)["params"]) == bits(
        some_state(3).params
    )
    # It stays until a newer step is complete, and does not count as kept.
    checkpoints.keep = 2
    checkpoints.save(4, some_state(4), fingerprint="data")
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]


def test_arrays_that_were_written_wrongly_are_named(two_steps, tmp_path):
    """The files are unchanged, but an array differs from the saved one."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "6" / digests.FILE
    content = digests.read(tmp_path / "6")
    content["leaves"]["params.norm.scale"]["sha256"] = "0" * 64
    path.write_bytes(digests._encoded(content))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    said = refused(
        lambda: checkpoints.restore(6, some_state(0), fingerprint=None), DamagedError
    )
    assert "params.norm.scale differs" in said
    assert "params.norm.scale" in refused(lambda: verify(tmp_path / "6"), DamagedError)
    checkpoints.close()


def test_a_damaged_newest_step_is_saved_again(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "6" / digests.FILE, 100)
    checkpoints = Checkpoints(tmp_path)
    step, _ = checkpoints.restore_newest(some_state(0), fingerprint="data")
    saver = Saver(checkpoints, fingerprint="data", allowed=0)
    saver.save(step, some_state(step))  # already saved
    assert not checkpoints.saving()
    saver.save(6, some_state(6))
    saver.finish()
    checkpoints.close()
    assert all(verify(tmp_path / str(step)) for step in (3, 6))
    assert checkpoints.steps() == [3, 6]


@shown()
@pytest.mark.parametrize("damaged", [3, 9])
def test_damaged_steps_are_removed_when_a_run_is_complete(
    two_steps, tmp_path, damaged, capsys
):
    """An older kept step, and a step after the last step of the run."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    if damaged == 9:
        shutil.copytree(tmp_path / "6", tmp_path / "9")
    else:
        flip(tmp_path / "3" / "state" / "_METADATA", 77)
    checkpoints = Checkpoints(tmp_path)
    step, _ = checkpoints.restore_newest(some_state(0), fingerprint="data")
    assert step == 6
    fed = []
    checkpoints.remove_damaged(feed=lambda: fed.append(1))
    checkpoints.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step {damaged} is ")
    assert len(fed) == 1
    assert checkpoints.steps() == ([6] if damaged == 3 else [3, 6])
    assert main(["xsmae verify", str(tmp_path)]) == 0


def test_files_are_checked_without_the_other_processes(two_steps, monkeypatch):
    """Only process 0 removes damaged steps, so it must not wait for the others."""
    waited_for = []
    monkeypatch.setattr(
        multihost,
        "sync_global_processes",
        lambda *args, processes=None, **kwargs: waited_for.append(processes),
    )
    check_files(two_steps / "6")
    assert waited_for
    assert all(processes == {0} for processes in waited_for)


def test_none_that_is_whole_is_an_error(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in ("3", "6"):
        flip(tmp_path / step / digests.FILE, 100)
    checkpoints = Checkpoints(tmp_path)
    said = refused(
        lambda: checkpoints.restore_newest(some_state(0), fingerprint="data"),
        DamagedError,
    )
    assert f"{tmp_path}: all saved steps are damaged" in said
    checkpoints.close()


@shown()
def test_steps_of_before_there_were_digests_go_on_with_a_line(tmp_path, capsys):
    with ocp.Checkpointer(create_handler()) as checkpointer:
        position = {"schema": 1, "batches": 5, "source": "data"}
        checkpointer.save(
            tmp_path / "5",
            ocp.args.Composite(
                state=ocp.args.StandardSave(some_state(5)),
                position=ocp.args.JsonSave(position),
            ),
        )
    checkpoints = Checkpoints(tmp_path)
    step, state = checkpoints.restore_newest(some_state(0), fingerprint="data")
    checkpoints.close()
    assert step == 5
    assert bits(state) == bits(some_state(5))
    assert "saved without digests" in capsys.readouterr().out
    assert main(["xsmae verify", str(tmp_path)]) == 0
    assert "step 5: saved without digests, not checked" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "5" / "state")
    checkpoints = Checkpoints(tmp_path)
    said = refused(lambda: checkpoints.restore(5, some_state(0), fingerprint=None))
    assert "cannot be restored" in said
    checkpoints.close()


def test_verify_tells_of_each_step(two_steps, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir / "checkpoints")
    for directory in (workdir, workdir / "checkpoints"):
        assert main(["xsmae verify", str(directory)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said == ["step 3: good", "step 6: good"]
    flip(workdir / "checkpoints" / "3" / "state" / "_METADATA", 77)
    assert main(["xsmae verify", str(workdir)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 3: damaged: ")
    assert "state/_METADATA has changed" in first
    assert second == "step 6: good"
    for wrong in (["verify"], ["check", str(workdir)], ["verify", str(tmp_path / "x")]):
        assert main(["checkpoints", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["checkpoints", "--help"]) == 0


# Killed during a save

SAVING = """
import sys
from tests.support.states import some_state
from xsmae.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
start = checkpoints.latest_step() or 0
for step in range(start + 1, start + 1000):
    checkpoints.save(step, some_state(step), fingerprint="data")
    print(step, flush=True)
"""


def test_killed_at_any_moment_of_a_save_whole_steps_are_left(tmp_path):
    rng, newest = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING.replace("sys.argv[1]", repr_of(tmp_path))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        begun = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        printed, _ = process.communicate(timeout=60)
        begun += [int(line) for line in printed.splitlines()]
        checkpoints = Checkpoints(tmp_path)
        assert all(verify(tmp_path / str(step)) for step in checkpoints.steps())
        # A save waits for the previous one, so all except the last are complete.
        assert checkpoints.latest_step() >= begun[-1] - 1 > newest
        assert len(checkpoints.steps()) >= 2
        newest = checkpoints.latest_step()
        assert {path.name for path in tmp_path.iterdir()} == {
            str(step) for step in checkpoints.steps()
        }
        checkpoints.close()


def repr_of(path):
    return f"__import__('pathlib').Path({str(path)!r})"


def test_an_older_step_goes_only_once_the_newer_one_is_whole(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1], keep=1)
    write = digests.write

    def slow(folder, leaves, position):
        assert checkpoints.steps() == [1]
        write(folder, leaves, position)
        assert checkpoints.steps() == [1]

    monkeypatch.setattr(store.digests, "write", slow)
    checkpoints.save(2, some_state(2), fingerprint="data")
    checkpoints.close()
    assert checkpoints.steps() == [2]


def test_what_dead_saves_have_left_is_removed(tmp_path):
    saved(tmp_path, [1]).close()
    for name in ("saving-2", "saving-3.orbax-checkpoint-tmp", "removed-0"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    (tmp_path / "notes").mkdir()
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [1]
    assert len(list(tmp_path.iterdir())) == 5
    reader.close()
    Checkpoints(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "notes"]


# Full disks


def full(directory):
    return types.SimpleNamespace(free=2**20)


def test_space_is_checked_before_a_save(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])
    monkeypatch.setattr(store.shutil, "disk_usage", full)
    said = refused(
        lambda: checkpoints.save(2, some_state(2), fingerprint="data"), SaveError
    )
    assert "has 1 MiB free, expected 32 or more" in said
    checkpoints.close()
    assert checkpoints.steps() == [1]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["at once", "in the background", "the digests"])
def test_a_disk_that_fills_in_a_save_leaves_the_older_step(
    tmp_path, monkeypatch, where
):
    checkpoints = saved(tmp_path, [1], keep=1)
    with monkeypatch.context() as patched:
        place, name = {
            "at once": (ocp.AsyncCheckpointer, "save"),
            "in the background": (ocp.AsyncCheckpointer, "wait_until_finished"),
            "the digests": (digests, "write"),
        }[where]
        patched.setattr(place, name, no_space)

        def save():
            checkpoints.save(2, some_state(2), fingerprint="data")
            checkpoints.wait()

        assert "No space left on device" in refused(save, SaveError)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.save(3, some_state(3), fingerprint="data")
    checkpoints.close()
    assert checkpoints.steps() == [3]


def test_a_state_that_is_not_finite_takes_no_ones_place(tmp_path):
    checkpoints = saved(tmp_path, [1], keep=1)
    params = some_state(2).params
    params["kernel"] = params["kernel"].at[3, 4].set(jnp.inf)

    def save():
        checkpoints.save(2, some_state(2, params=params), fingerprint="data")
        checkpoints.wait()

    assert "params.kernel has numbers that are not finite" in refused(save, SaveError)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("replaced_by", ["nothing", "a file"])
def test_a_folder_that_vanishes_is_told_and_not_made_anew(tmp_path, replaced_by):
    directory = tmp_path / "checkpoints"
    checkpoints = saved(directory, [1])
    shutil.rmtree(directory)
    if replaced_by == "a file":
        directory.write_text("")
    said = refused(
        lambda: checkpoints.save(2, some_state(2), fingerprint="data"), SaveError
    )
    assert "no longer exists" in said
    checkpoints.close()
    assert not directory.is_dir()


@shown()
def test_so_many_saves_may_fail_in_a_row(tmp_path, monkeypatch, capsys):
    checkpoints = saved(tmp_path, [1])
    saver = Saver(checkpoints, fingerprint="data", allowed=2)
    with monkeypatch.context() as patched:
        patched.setattr(store.shutil, "disk_usage", full)
        for step in (2, 3):
            saver.save(step, some_state(step))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "2 of 2 saves in a row" in said[1]
    begun = []
    save = checkpoints.save

    def counted(step, state, **options):
        begun.append(step)
        save(step, state, **options)

    monkeypatch.setattr(checkpoints, "save", counted)
    saver.save(4, some_state(4))
    saver.save(4, some_state(4))  # while the save runs
    saver.finish()
    saver.save(4, some_state(4))  # after it is done
    assert begun == [4]
    assert saver.failures == 0
    monkeypatch.setattr(digests, "write", no_space)
    saver.allowed = 1
    saver.save(5, some_state(5))
    deadline = time.monotonic() + 60
    while not saver.failures:
        assert time.monotonic() < deadline
        saver.poll()
    assert "step 5 could not be saved" in capsys.readouterr().out
    saver.save(6, some_state(6))
    said = refused(saver.finish, SaveError)
    assert "step 4 is saved; the same command resumes" in said
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]
