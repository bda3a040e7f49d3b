"""A folder of this process's own beside the cache, that goes with the process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from ...errors import StorageError
from .folders import CACHE_VARIABLE, cache_folder

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PREFIX = "temporary-"
_LOCK = "in-use"
_UNLOCKED_SECONDS = 3600
"""A folder without a lock file may belong to a process that is just making it; after this long it does not."""

_TRIES = 3
"""Then the file system has no locks, so that no process can take another's folder for an abandoned one either."""


def temporary_folder() -> Path:
    """Folder of this process's own, for quantized files that are not to be kept; removes those of dead processes.

    A process holds a lock on a file in its folder for as long as it lives. Process numbers would not do: containers
    that share a cache each have their own.

    Raises:
        StorageError: the cache's folder cannot be written.
    """
    return _claimed(cache_folder())


def is_temporary(path: Path) -> bool:
    """Whether `path` lies in such a folder."""
    return path.parent.name.startswith(_PREFIX) and (path.parent / _LOCK).exists()


@functools.lru_cache(maxsize=4)
def _claimed(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        for _ in range(_TRIES):
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = (folder / _LOCK).open("w")
            # Another process may take the folder for an abandoned one before the lock is ours.
            if _lock(lock) and (folder / _LOCK).exists():
                break
    except OSError as error:
        raise StorageError(
            f"{parent} cannot be written ({error.strerror or error}): name another folder in {CACHE_VARIABLE}."
        ) from None
    atexit.register(_release, folder, lock)
    return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose process is gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder)


def _is_abandoned(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as lock:
            return _lock(lock)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > _UNLOCKED_SECONDS


def _lock(file: IO[str]) -> bool:
    """Take the lock on `file` until it is closed; whether nobody else had it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _release(folder: Path, lock: IO[str]) -> None:
    lock.close()
    # Windows keeps files that are mapped: the next process removes those.
    shutil.rmtree(folder, ignore_errors=True)
