"""The range of GSDs in a run: writing, resuming, and when it is unknown."""

import json

import numpy as np
import pytest

from xsmae.weights import gsd_range
from xsmae.weights.gsd_range import NAME, GsdRange, seen_by_all, seen_by_run, seen_until


def add(folder, start, *batches):
    """Add the steps after `start`, each with its GSDs."""
    seen = GsdRange(folder, start=start)
    for step, gsd in enumerate(batches, start + 1):
        seen.add(step, np.array(gsd, np.float32))


def test_only_a_wider_range_is_written(tmp_path):
    add(tmp_path, 0, [1.0, 2.0], [1.5, 1.6], [0.5], [0.5, 2.0], [3.0])
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [(row["step"], row["low"], row["high"]) for row in rows] == [
        (1, 1.0, 2.0), (3, 0.5, 2.0), (5, 0.5, 3.0),
    ]  # fmt: skip
    assert seen_until(tmp_path, 2) == (1.0, 2.0)
    assert seen_until(tmp_path, 4) == (0.5, 2.0)
    assert seen_by_all(tmp_path, 5) == seen_by_run(tmp_path, 5) == (0.5, 3.0)


def test_resumed_it_is_that_of_one_run(tmp_path):
    batches = [[1.0, 2.0], [0.7], [4.0], [0.1], [5.0]]
    whole = tmp_path / "whole"
    whole.mkdir()
    add(whole, 0, *batches)
    add(tmp_path, 0, *batches[:4])  # killed; the last saved step was 2
    add(tmp_path, 2, *batches[2:])
    assert (tmp_path / NAME).read_text() == (whole / NAME).read_text()


def test_a_run_that_begins_anew_forgets(tmp_path):
    add(tmp_path, 0, [1.0, 2.0])
    add(tmp_path, 0, [7.0])
    assert seen_by_run(tmp_path, 1) == (7.0, 7.0)


def test_a_run_that_began_without_it_does_not_tell(tmp_path):
    add(tmp_path, 3, [1.0], [2.0])
    assert seen_by_all(tmp_path, 5) is None
    add(tmp_path, 5, [3.0])
    assert seen_by_run(tmp_path, 6) is None


def test_another_number_of_processes_does_not_tell(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gsd_range.jax, "process_count", lambda: 2)
        add(tmp_path, 0, [1.0])
    add(tmp_path, 1, [2.0])
    assert seen_by_all(tmp_path, 2) is None


def test_the_processes_of_a_run_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gsd_range.jax, "process_count", lambda: 2)
    other = tmp_path / "process_1"
    other.mkdir()
    add(tmp_path, 0, [1.0, 2.0])
    assert seen_by_run(tmp_path, 1) is None  # only one of two processes is known
    add(other, 0, [0.5, 1.5])
    assert seen_by_run(tmp_path, 1) == (0.5, 2.0)


def test_a_full_disk_is_made_up_for(tmp_path, caplog):
    seen = GsdRange(tmp_path, start=0)
    (tmp_path / NAME).mkdir()  # a folder cannot be appended to
    for step in (1, 2):
        seen.add(step, np.float32([1.0, 2.0]))
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / NAME).rmdir()
    seen.add(3, np.float32([1.5]))
    assert seen_until(tmp_path, 3) == (1.0, 2.0)


@pytest.mark.parametrize("step", [0, 4])
def test_no_row_no_range(tmp_path, step):
    add(tmp_path, 0)
    assert seen_until(tmp_path, step) is None
