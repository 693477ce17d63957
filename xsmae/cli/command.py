"""How every command begins and ends: its help, and what becomes of errors.

The exit statuses that all commands share: 0; 2 for a UserError, which is one line on
stderr; 128 + n where signal n ended it; 141 where the reader of a pipe left, as head
does. A command's own, such as 1 for a damaged checkpoint, are what it returns.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from absl import flags, logging

from xsmae.errors import OutsideTrainingWarning, UserError, memory_shortage
from xsmae.process.log import shown
from xsmae.process.signals import StopRequest

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE
LESS_MEMORY = "end other programs, or use a machine that has more"
WIDTH = 88

# What a command is: called with its arguments, returns its exit status.
Call = Callable[[list[str]], int]
# Title -> what defines the flags below it, for the help.
Sections = Mapping[str, Callable[[flags.FlagValues], None]]
# How `flag_type` of absl is written in the help.
KINDS = {
    "int": "INTEGER",
    "float": "NUMBER",
    "string": "TEXT",
    "comma separated list of strings": "A,B,...",
}


def run(
    call: Call,
    argv: Sequence[str] | None,
    *,
    doc: str,
    sections: Sections,
    less_memory: str = LESS_MEMORY,
) -> int:
    """Call `call(argv)`, or print the help; returns the exit status.

    doc: the module's docstring, whose first line is an example. argv: the name of the
    command and its arguments, by default the process's own. less_memory: how the
    command is made to need less.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        if {"--help", "-h", "--helpfull"} & set(argv):
            print(help_text(doc, sections))
            status = 0
        else:
            status = _called(call, argv, less_memory)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        closed = [s for s in (sys.stdout, sys.stderr) if _has_no_reader(s)]
        if not closed:
            raise
        for stream in closed:  # what they still hold goes nowhere, without an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return PIPE_CLOSED


def _called(call: Call, argv: list[str], less_memory: str) -> int:
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of errors
    try:
        with shown(), _plain_warnings(), memory_shortage(less_memory):
            return call(argv)
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("xsmae: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our own warnings as one line, without the place in the code."""

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, OutsideTrainingWarning):
            print(f"xsmae: {message}", file=sys.stderr)
        else:
            python(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        python, warnings.showwarning = warnings.showwarning, show
        # Pillow's warning of large images; `max_pixels` decides about them.
        warnings.filterwarnings("ignore", "Image size .* decompression bomb")
        yield


def _has_no_reader(stream: TextIO) -> bool:
    """True if the stream is a pipe that nobody reads any more."""
    try:
        descriptor = stream.fileno()
    except OSError:  # of a notebook, which has none
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def stoppable(
    call: Callable[[list[str], Callable[[], bool]], int],
    left: str = "stopped; the same command resumes from here",
) -> Call:
    """A command that SIGINT and SIGTERM stop between two batches.

    call(argv, should_stop) raises KeyboardInterrupt where should_stop() is True. left:
    what is printed then.
    """

    def stopped(argv: list[str]) -> int:
        with StopRequest() as stop:
            try:
                return call(argv, lambda: stop.signal is not None)
            except KeyboardInterrupt:
                print(f"xsmae: {left}", file=sys.stderr)
                return 128 + (stop.signal or signal.SIGINT)

    return stopped


def example(doc: str) -> str:
    """The example that a command's docstring begins with."""
    return doc.splitlines()[0]


def help_text(doc: str, sections: Sections) -> str:
    """The docstring, and under each title the flags that are defined."""
    parts = [doc.strip()]
    for title, define in sections.items():
        values = flags.FlagValues()
        define(values)
        parts.append("\n".join([f"{title}:", *(_flag_help(values[n]) for n in values)]))
    return "\n\n".join(parts)


def _flag_help(flag: flags.Flag) -> str:
    """A flag with the kind of its value and its default, and what it means."""
    if isinstance(flag.parser, flags.EnumParser):
        told = f"--{flag.name}={'|'.join(flag.parser.enum_values)}"
    elif flag.boolean:
        told = f"--[no]{flag.name}"
    else:
        kind = flag.flag_type()
        told = f"--{flag.name}={KINDS.get(kind, kind)}"
    if flag.default is not None and not (flag.boolean and not flag.default):
        told += f"  (default: {flag.default_as_str.strip(chr(39))})"
    about = textwrap.fill(
        re.sub(r"^<[^>]*>: ", "", flag.help),  # absl's list of an enum's values
        WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,  # so that the names of flags stay whole
    )
    return f"  {told}\n{about}"
