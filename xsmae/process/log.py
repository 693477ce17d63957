"""What a process tells the person who started it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

# All of the library writes here. A program that uses the library sees what it asks the
# logger "xsmae" for, and by default warnings alone, as with any other library.
LOG = logging.getLogger("xsmae")


class Terminal(logging.Handler):
    """Prints plain lines to stdout; of several processes, info comes from process 0.

    Warnings come from every process, since each may meet what the others do not.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or _is_first_process():
            # The stdout of now, which a caller may have redirected. An error, such as
            # that of a pipe whose reader has ended, is the caller's.
            print(record.getMessage(), flush=True)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the library's lines in the terminal while inside; also a decorator.

    Handlers that a program has given the logger stay the only ones.
    """
    if LOG.handlers:
        yield
        return
    terminal, level, propagate = Terminal(), LOG.level, LOG.propagate
    LOG.addHandler(terminal)
    LOG.setLevel(level or logging.INFO)
    LOG.propagate = False  # absl's handler at the root would print each line again
    try:
        yield
    finally:
        LOG.removeHandler(terminal)
        LOG.setLevel(level)
        LOG.propagate = propagate


def _is_first_process() -> bool:
    # jax is neither imported for this nor, in a run of one process, are its devices.
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0
