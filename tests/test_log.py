"""Which of the library's log lines a process prints."""

import io
import logging
import subprocess
import sys

import jax
import pytest

from xsmae.process.log import LOG, shown


def test_lines_are_shown_as_they_are_while_inside(capsys):
    with shown():
        LOG.info("100 % of %s")
        LOG.warning("a full disk")
        with shown():  # the command, and the run inside it
            LOG.info("once")
        LOG.info("still")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["100 % of %s", "a full disk", "once", "still"]
    assert captured.err == ""
    assert (LOG.handlers, LOG.level, LOG.propagate) == ([], logging.NOTSET, True)


def test_they_follow_stdout(capsys, monkeypatch):
    with shown():
        LOG.info("first")
        monkeypatch.setattr(sys, "stdout", elsewhere := io.StringIO())
        LOG.info("second")
    assert elsewhere.getvalue() == "second\n"


def test_a_pipe_without_reader_is_the_callers_error(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError), shown():
        LOG.info("line")
    assert LOG.handlers == []


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_a_program_keeps_its_own_handlers_and_level(level, capsys):
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    LOG.setLevel(level or logging.INFO)
    LOG.addHandler(handler)
    try:
        with shown():
            LOG.info("info")
            LOG.warning("warning")
    finally:
        LOG.removeHandler(handler)
    assert len(seen) == (2 if level == logging.NOTSET else 1)
    try:
        with shown():
            LOG.info("info")
    finally:
        LOG.setLevel(logging.NOTSET)
    assert capsys.readouterr().out == ("info\n" if level == logging.NOTSET else "")


@pytest.mark.parametrize("index", [0, 1])
def test_info_of_several_processes_is_that_of_the_first(index, monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    with shown():
        LOG.info("all say this")
        LOG.warning("what one alone meets")
    expected = ["all say this"] * (index == 0) + ["what one alone meets"]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_line_starts_no_device_and_a_library_is_quiet():
    code = """
import jax
from jax._src import xla_bridge
from xsmae.process.log import LOG, shown
LOG.info("unasked")
with shown():
    LOG.info("asked")
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("asked\n", "")


def test_names_of_files_that_are_not_utf_8_are_escaped(capfdbinary):
    """The C locale would write their bytes as they are."""
    with shown():
        LOG.warning(b"roof/\xff.jpg".decode(errors="surrogateescape"))
    assert capfdbinary.readouterr().out == b"roof/\\udcff.jpg\n"
