"""A lock that lets one process use a folder; it ends with the process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from xsmae.errors import UserError
from xsmae.process.log import LOG

FILE = "lock"
# Errors of `flock` on file systems without locks, such as some kinds of NFS.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FolderLock:
    """A context that only one process can enter per folder.

    The kernel holds the lock (`flock`) and frees it when the process ends for any
    reason, so there is nothing to clean up. `<folder>/lock` names the holder. The lock
    works between hosts on file systems that share `flock`, such as NFS with locks,
    Lustre mounted with `flock`, or CephFS. There, a host that dies keeps the lock until
    the server notices.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        """Takes the lock; UserError names the holder, or says why it failed."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to the workdir {folder}: {error.strerror}; give another "
                "folder"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._close()
            raise UserError(
                f"{folder} is in use by {holder}: wait until it ends, stop it, or give "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            LOG.warning(
                f"{folder} is on a file system without locks ({error.strerror}): do "
                "not start a second process on it"
            )
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{json.dumps(holder)}\n".encode(), 0)
        return self

    def __exit__(self, *_) -> None:
        # Keep the file. After a removal, two processes could lock the old and new file.
        os.ftruncate(self._handle, 0)
        self._close()

    def _close(self) -> None:
        os.close(self._handle)
        self._handle = None

    def _holder(self) -> str:
        try:
            told = json.loads(os.pread(self._handle, 4096, 0))
            return f"process {told['pid']} on {told['host']} since {told['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
