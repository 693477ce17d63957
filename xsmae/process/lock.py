"""One process a folder: a lock that ends with the process that holds it."""

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
# What `flock` says on a file system that has no locks, some kinds of NFS among them.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FolderLock:
    """While entered, no other process enters the folder's lock.

    The kernel holds it (`flock`) and frees it when the process ends, however it ends,
    so that nothing has to be cleaned. `<folder>/lock` tells who has it. Between hosts
    it holds on file systems that share `flock`, such as NFS with its locks, Lustre
    mounted with `flock`, or CephFS; a host that dies there keeps it until the server
    notices.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        """Raises UserError, which tells who holds it, and where it cannot be made."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to the workdir {folder}: {error.strerror}; give another "
                "one"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._close()
            raise UserError(
                f"{folder} is in use by {holder}: wait for its end, stop it, or give "
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
        # The file stays: one that is removed could be locked by two, old name and new.
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
