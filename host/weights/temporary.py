"""A folder of this process's own beside the cache, that goes with the process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import time
from pathlib import Path

from ...errors import StorageError
from ...ops.lock_file import LockFile, abandoned
from ...ops.writer import remove_half_written
from .folders import CACHE_VARIABLE, cache_folder

_PREFIX = "temporary-"
_LOCK = "in-use"
_UNLOCKED_SECONDS = 3600
"""A folder without a lock file may belong to a process that is just making it; after this long it does not."""


def temporary_folder() -> Path:
    """Folder of this process's own, for quantized files that are not to be kept; removes those of dead processes.

    Raises:
        StorageError: the cache's folder cannot be written.
    """
    return _claimed(cache_folder())


def is_temporary(path: Path) -> bool:
    """Whether `path` lies in such a folder."""
    return path.parent.name.startswith(_PREFIX) and (path.parent / _LOCK).exists()


def remove_abandoned(parent: Path) -> None:
    """Remove what processes that are gone left in `parent`: their temporary folders, and files half-written."""
    remove_half_written(parent)
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_if_abandoned(folder)


@functools.lru_cache(maxsize=4)
def _claimed(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # Another process may take the folder for an abandoned one before the lock is ours.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                lock = LockFile(folder / _LOCK)
                break
    except OSError as error:
        raise StorageError(
            f"{parent} cannot be written ({error.strerror or error}): name another folder in {CACHE_VARIABLE}."
        ) from None
    atexit.register(_release, folder, lock)
    return folder


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with abandoned(folder / _LOCK) as dead:
            if dead:
                shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        dead = time.time() - folder.stat().st_mtime > _UNLOCKED_SECONDS
    if dead:
        # Windows has kept the lock file until now.
        shutil.rmtree(folder, ignore_errors=True)


def _release(folder: Path, lock: LockFile) -> None:
    lock.release()
    # Windows keeps files that are mapped: the next process removes those.
    shutil.rmtree(folder, ignore_errors=True)
