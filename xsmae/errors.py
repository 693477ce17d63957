"""The ways in which a user's input, or what keeps it, can be wrong, and be told."""

import contextlib
from collections.abc import Iterator

# How XLA says that memory is short: for its arrays, and where a CPU's product could not
# have what it needs beside them (jax 0.10).
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "YNNPACK operation failed")


def printable(text: str) -> str:
    """As any file and terminal takes it: with the codes of bytes that are no UTF-8.

    File names may have them; Python's stderr writes the same.
    """
    return text.encode(errors="backslashreplace").decode()


class UserError(ValueError):
    """Input that the user can mend: a flag, a config field, a folder, a table.

    The message is ONE line: what was found, what was expected, how to mend it. The
    binaries print it without a traceback and exit with status 2.
    """


class DamagedError(UserError):
    """A checkpoint that is not as it was saved. The message names the file or leaf."""


class OutsideTrainingWarning(UserWarning):
    """An encoder is given images of a GSD that its training did not show it."""


class SaveError(UserError):
    """A checkpoint that could not be written; those before it are as they were."""


@contextlib.contextmanager
def memory_shortage(advice: str) -> Iterator[None]:
    """Too little memory, of a device or of the host, as a UserError that says `advice`.

    Linux may end a process that takes too much without a word; that cannot be told.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = any(text in reason for text in _OUT_OF_MEMORY)
        if not short and not isinstance(error, MemoryError):
            raise
        raise UserError(
            f"there is too little memory ({reason[:200]}): {advice}"
        ) from None


class BadImageError(ValueError):
    """One record of a source that cannot be used (unreadable, wrong mode, ...).

    The message is one line, the reason. The pipeline replaces such a record by the
    next good one, counts it and lists it in `rejected.jsonl`.
    """
