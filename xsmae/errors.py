"""Errors in user input and files, with messages for the user."""

import contextlib
import re
from collections.abc import Iterator

# XLA's messages when memory runs out: for arrays, and for the workspace of a product on
# a CPU (jax 0.10).
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "YNNPACK operation failed")


def printable(text: str) -> str:
    """Escapes bytes that are not UTF-8, so that any file or terminal accepts the text.

    File names may contain such bytes. Python's stderr escapes them in the same way.
    """
    return text.encode(errors="backslashreplace").decode()


class UserError(ValueError):
    """An error in input that the user can fix: a flag, a config field, a folder, a CSV.

    The message is ONE line: what was found, what was expected, how to fix it. The
    commands print it without a traceback and exit with status 2.
    """


class DamagedError(UserError):
    """A checkpoint that changed after it was saved; the message names the part."""


class OutsideTrainingWarning(UserWarning):
    """An encoder gets images with a GSD outside the range of its training."""


class SaveError(UserError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


@contextlib.contextmanager
def memory_shortage(advice: str) -> Iterator[None]:
    """Turns lack of device or host memory into a UserError with `advice`.

    Linux may kill a process that uses too much memory; no error can report that.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = any(text in reason for text in _OUT_OF_MEMORY)
        if not short and not isinstance(error, MemoryError):
            raise
        raise UserError(f"too little memory ({reason[:200]}): {advice}") from None


class BadImageError(ValueError):
    """One record of a source cannot be used (unreadable, wrong mode, ...).

    The message is the reason, in one line. The pipeline replaces the record with the
    next good one, counts it and lists it in `rejected.jsonl`.
    """


def of_flags(error: Exception) -> str:
    """absl's message about a wrong flag, in one line and in plain words."""
    text = " ".join(str(error).split()).removeprefix("flag ")
    text = re.sub("could not convert string to float: .*", "expected a number", text)
    return re.sub("invalid literal for int.*", "expected a whole number", text)
