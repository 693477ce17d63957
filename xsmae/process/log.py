"""Messages of a process to the person who started it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from xsmae.errors import printable

# The whole library logs here. A program that uses the library configures the logger
# "xsmae"; by default it shows only warnings, as with any other library.
LOG = logging.getLogger("xsmae")


class Terminal(logging.Handler):
    """Prints plain lines to stdout; with several processes, info only from process 0.

    Every process prints warnings, since each may have its own.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or _is_first_process():
            # print uses the current stdout, which a caller may have redirected. Errors,
            # such as a closed pipe, go to the caller.
            print(printable(record.getMessage()), flush=True)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Shows the library's lines in the terminal; a context manager and a decorator.

    If a program has added handlers to the logger, it adds none.
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
    # Do not import jax for this, and do not start its devices in a single process.
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0
