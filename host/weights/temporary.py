"""A folder of this process's own beside the cache, that goes with the process, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
from pathlib import Path

from ...errors import StorageError
from ...ops.lock_file import LockFile, abandoned
from ...ops.writer import remove_half_written
from .folders import CACHE_VARIABLE, cache_folder

_PREFIX, _LOCK = "temporary-", ".lock"
"""Of a folder's name, and of the lock file's beside it."""


def temporary_folder() -> Path:
    """Folder of this process's own, for quantized files that are not to be kept; removes those of dead processes.

    Raises:
        StorageError: the cache's folder cannot be written.
    """
    return _claimed(cache_folder())


def is_temporary(path: Path) -> bool:
    """Whether `path` lies in such a folder."""
    return path.parent.name.startswith(_PREFIX) and path.parent.with_suffix(_LOCK).exists()


def remove_abandoned(parent: Path) -> None:
    """Remove what processes that are gone left in `parent`: their temporary folders, and files half-written."""
    remove_half_written(parent)
    for lock in parent.glob(f"{_PREFIX}*{_LOCK}"):
        with contextlib.suppress(OSError), abandoned(lock) as dead:
            if dead:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)


@functools.lru_cache(maxsize=4)
def _claimed(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        while True:
            folder = parent / f"{_PREFIX}{secrets.token_hex(4)}"
            with contextlib.suppress(FileExistsError):
                lock = LockFile(folder.with_suffix(_LOCK))
                folder.mkdir()
                break
    except OSError as error:
        raise StorageError(
            f"{parent} cannot be written ({error.strerror or error}): name another folder in {CACHE_VARIABLE}."
        ) from None
    atexit.register(_release, folder, lock)
    return folder


def _release(folder: Path, lock: LockFile) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # Windows keeps files that are mapped: the next process finds those by the lock file.
    if not os.path.exists(folder):
        lock.release()
