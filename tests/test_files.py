"""Atomic writes, and the JSON lines of a resumed run."""

import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from xsmae.process.files import atomic_write, keep_rows, read_jsonl


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
        assert list(tmp_path.glob("*.json")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the first writer ended last
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    for name in ("text", "tensors"):
        with atomic_write(tmp_path / name) as temporary:
            if name == "text":
                temporary.write_text("new")
            else:
                save_file({"a": np.ones(2)}, temporary)
        assert mode(tmp_path / name) == 0o666 & ~umask


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "a.json"):
        raise AssertionError("nothing can be written there")


def write_rows(path, *steps):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def test_rows_of_later_steps_are_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, 0, 1, 2, 3)
    with path.open("a") as file:
        file.write('{"step": 1, "ha')
    assert keep_rows(path, 2) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert path.read_text().splitlines() == [f'{{"step": {i}}}' for i in range(3)]
    assert read_jsonl(path) == keep_rows(path, 9)
    assert keep_rows(path, None) == []
    assert path.read_text() == ""


def test_no_file_has_no_rows_and_is_not_made(tmp_path):
    assert keep_rows(tmp_path / "a.jsonl", 3) == []
    assert read_jsonl(tmp_path / "a.jsonl") == []
    assert not list(tmp_path.iterdir())
