"""Removes a temporary quantized file when the last model that was loaded from it goes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .temporary import is_temporary

_HELD = "_lowbit_temporary_files"


class _File:
    """Stands for a file that is removed when nobody refers to this any more."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, _remove, path).atexit = False


_FILES: weakref.WeakValueDictionary[Path, _File] = weakref.WeakValueDictionary()
"""Those that are in use."""


def remove_with(owner: Any, path: Path | str) -> None:
    """Remove `path`, where it is a temporary file, once `owner` and all others it was given with are gone."""
    path = Path(path)
    if is_temporary(path):
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
