"""One driver at a time: an advisory lock on a file, which vanishes with its process."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

from noisescale.errors import InvalidInputError


class DriverLock:
    """Exclusive lock of a folder, held while its file is open.

    The kernel drops it when the process dies, however that happens, so that no stale lock is
    ever in the way. The file names its holder for the one who is refused.

    Args:
        path: the lock's file; made when it is absent, never removed (removing it would let two
            drivers hold locks on two files of one name).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock at once, or refuse.

        Raises:
            InvalidInputError: another driver has it, or the file system has no locks.
        """
        # Imported here: Windows has no fcntl, and what does not lock works there too.
        import fcntl

        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as problem:
            raise _cannot_lock(self.path, problem) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sign(descriptor)
        except OSError as problem:
            os.close(descriptor)
            if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _taken(self.path) from None
            raise _cannot_lock(self.path, problem) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _sign(descriptor: int) -> None:
    holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)


def _taken(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"store {str(path.parent)!r}",
        f"another driver is working on it ({_holder(path)})",
        "wait for it or stop it, or give another folder",
    )


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not named"


def _cannot_lock(path: Path, problem: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"store {str(path.parent)!r}",
        f"it cannot be locked for writing ({problem.strerror})",
        "give a folder that you can write to, on a file system with locks",
    )
