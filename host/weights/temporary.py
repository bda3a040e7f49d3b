"""A folder of this process's own beside the cache, that goes with the process; its files go with the models loaded from them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import StorageError
from ...ops.lock_file import LockFile, abandoned
from ...ops.writer import remove_half_written
from .folders import CACHE_VARIABLE, cache_folder

_PREFIX, _LOCK = "temporary-", ".lock"
"""Of a folder's name, and of the lock file's beside it."""
_HELD = "_lowbit_temporary_files"


def temporary_folder() -> Path:
    """Folder of this process's own, for quantized files that are not to be kept; removes those of dead processes.

    Raises:
        StorageError: the cache's folder cannot be written.
    """
    return _claimed(cache_folder())


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


class _File:
    """Stands for a file that is removed when nobody refers to this any more."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, _remove, path).atexit = False


_FILES: weakref.WeakValueDictionary[Path, _File] = weakref.WeakValueDictionary()
"""Those that are in use."""


def remove_with(owner: Any, path: Path | str) -> None:
    """Remove `path`, where it is a temporary file, once `owner` and all others it was given with are gone."""
    path = Path(path)
    if path.parent.name.startswith(_PREFIX) and path.parent.with_suffix(_LOCK).exists():
        file = _FILES[path] = _FILES.get(path) or _File(path)
        setattr(owner, _HELD, (*getattr(owner, _HELD, ()), file))


@contextlib.contextmanager
def removal_put_off() -> Iterator[None]:
    """Remove what is no longer used now, and nothing more meanwhile: a file found again is not yet used again."""
    if _FILES:
        gc.collect()
    kept = list(_FILES.values())
    try:
        yield
    finally:
        kept.clear()


def _remove(path: Path) -> None:
    # Windows keeps files that are mapped: those go with their folder.
    with contextlib.suppress(OSError):
        path.unlink()
