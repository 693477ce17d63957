"""Shared by all commands: help, error messages, exit statuses, signals.

Exit statuses: 0; 2 after a UserError, printed as one line on stderr; 128 + n after
signal n; 141 if the reader of a pipe closed it, as head does. Commands return others of
their own, such as 1 for a damaged checkpoint.
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
LESS_MEMORY = "end other programs, or use a machine with more memory"
WIDTH = 88

# A command: takes its arguments, returns its exit status.
Call = Callable[[list[str]], int]
# Title in the help -> a function that defines the flags below it.
Sections = Mapping[str, Callable[[flags.FlagValues], None]]
# absl's `flag_type` -> its name in the help.
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

    doc: the module's docstring; its first line is an example. argv: the command's name
    and its arguments, by default the process's own. less_memory: tells the user how to
    make the command need less memory.
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
        for stream in closed:  # discard what they still hold, without an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return PIPE_CLOSED


def _called(call: Call, argv: list[str], less_memory: str) -> int:
    logging.set_verbosity(logging.FATAL)  # Orbax logs every file and every error
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
    """Show our own warnings in one line, without the place in the code."""

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
    except OSError:  # a notebook's stream has no descriptor
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def stoppable(
    call: Callable[[list[str], Callable[[], bool]], int],
    left: str = "stopped; the same command resumes from here",
) -> Call:
    """A command that SIGINT and SIGTERM stop between batches.

    call(argv, should_stop) raises KeyboardInterrupt once should_stop() is true. left:
    the line printed then.
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
    """The example in the first line of a command's docstring."""
    return doc.splitlines()[0]


def help_text(doc: str, sections: Sections) -> str:
    """The docstring, then the flags of each section under its title."""
    parts = [doc.strip()]
    for title, define in sections.items():
        values = flags.FlagValues()
        define(values)
        parts.append("\n".join([f"{title}:", *(_flag_help(values[n]) for n in values)]))
    return "\n\n".join(parts)


def _flag_help(flag: flags.Flag) -> str:
    """A flag with its kind of value, its default and its meaning."""
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
        break_on_hyphens=False,  # do not break the names of flags
    )
    return f"  {told}\n{about}"
