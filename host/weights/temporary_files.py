"""Removes a temporary quantized file when the last model that was loaded from it goes."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .temporary import is_temporary


class _Files:
    """Who uses which file. Owners may go in any thread, and in the midst of anything: the lock is reentrant."""

    def __init__(self) -> None:
        self._change = threading.RLock()
        self._users: Counter[Path] = Counter()
        self._unused: set[Path] = set()
        self._kept = 0

    def add_user(self, path: Path) -> None:
        with self._change:
            self._users[path] += 1
            self._unused.discard(path)

    def remove_user(self, path: Path) -> None:
        with self._change:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]
                self._unused.add(path)
            self._remove_unused()

    @contextlib.contextmanager
    def keeping_all(self) -> Iterator[None]:
        if self._users:
            gc.collect()
        with self._change:
            self._kept += 1
        try:
            yield
        finally:
            with self._change:
                self._kept -= 1
                self._remove_unused()

    def _remove_unused(self) -> None:
        while self._unused and not self._kept:
            # Windows keeps files that are mapped: those go with their folder.
            with contextlib.suppress(OSError):
                self._unused.pop().unlink()


_files = _Files()


def remove_with(owner: object, path: Path | str) -> None:
    """Remove `path`, where it is a temporary file, once `owner` and all others it was given with are gone."""
    path = Path(path)
    if is_temporary(path):
        _files.add_user(path)
        weakref.finalize(owner, _files.remove_user, path).atexit = False


def removal_put_off() -> contextlib.AbstractContextManager[None]:
    """Remove what is no longer used now, and nothing more meanwhile: a file found again is not yet used again."""
    return _files.keeping_all()
