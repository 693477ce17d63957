"""The table in docs/reliability.md names all fault tests, and only existing ones."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs/reliability.md").read_text()
# Files that test nothing else.
FAULTS = (
    "test_faults.py", "test_hosts.py", "test_devices.py", "test_checkpoints.py",
    "test_trust.py", "test_broken_files.py", "test_fuzz.py",
    "test_raster_damage.py",
)  # fmt: skip
# Tests that the page mentions elsewhere, or whose parts other rows cover.
BESIDES = {
    "test_checkpoints.py::test_the_newest_and_every_so_many_are_kept",
    "test_checkpoints.py::test_steps_of_before_there_were_digests_go_on_with_a_line",
    "test_checkpoints.py::test_verify_tells_of_each_step",
    "test_trust.py::test_a_run_that_is_fed_goes_on",
    "test_broken_files.py::test_the_names_are_no_two_alike",
    "test_hosts.py::test_others_that_cannot_be_found",
}


def names_in(name):
    tree = ast.parse((TESTS / name).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f"{name}::{f.name}" for f in functions if f.name.startswith("test_")}


def test_every_row_has_a_test_that_there_is():
    rows = [
        line for line in TEXT.splitlines() if re.match(r"\| (?!fault|change)", line)
    ]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`(test_\w+\.py::\w+)`", row)
        assert named, row
        for one in named:
            assert one in names_in(one.partition("::")[0]), row


def test_every_test_of_the_faults_has_a_row():
    there = set().union(*map(names_in, FAULTS))
    assert there - BESIDES <= set(re.findall(r"`(test_\w+\.py::\w+)`", TEXT))
    assert there >= BESIDES
