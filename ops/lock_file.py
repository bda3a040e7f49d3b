"""Tells what a living process is working on from what a dead one left: a lock on a file of its own, which dies with it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


class LockFile:
    """A new file at `path`, locked until `release` or the end of this process, whichever comes first.

    What it stands for must not be made before it, and must be gone, or have its final name, before it is released.
    Process numbers would not do: containers that share a folder each have their own. Where the file system has no
    locks, no process can take another's file for an abandoned one either.

    Args:
        path: the file to make.

    Raises:
        FileExistsError: there is one already, or another process took it for an abandoned one at birth: use another name.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("x")
        if not (_locked(self._file) and os.path.exists(path)):
            self._file.close()
            raise FileExistsError(errno.EEXIST, "its lock is taken", str(path))

    def release(self) -> None:
        """Remove the file."""
        _remove(self.path, self._file)


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock file `path`: then it is held here for the block, and removed at its end.

    Raises:
        OSError: there is no such file, or it cannot be locked.
    """
    with path.open("r+") as file:
        dead = _locked(file, strict=True)
        yield dead
        if dead:
            _remove(path, file)


def _locked(file: IO[str], *, strict: bool = False) -> bool:
    """Lock `file` until it is closed; False where another has it. Without locks: True, or an OSError when `strict`."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if strict:
            raise
    return True


def _remove(path: Path, file: IO[str]) -> None:
    """Remove the file before its lock goes, where the system removes open files; Windows does not."""
    with contextlib.suppress(PermissionError):
        path.unlink(missing_ok=True)
    file.close()
    with contextlib.suppress(PermissionError):
        path.unlink(missing_ok=True)
