"""Where ComfyUI keeps models, and where this pack keeps the quantized files it makes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import folder_paths
import psutil

from ..errors import CheckpointError
from ..ops.checkpoint import INDEX_SUFFIX

CACHE_VARIABLE = "LOWBIT_CACHE_DIR"
"""Environment variable that names the folder for quantized files."""

_TEMPORARY = "temporary-"


def cache_folder() -> Path:
    """Folder of quantized files: `$LOWBIT_CACHE_DIR`, or `lowbit_cache` in ComfyUI's models folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path(folder_paths.models_dir) / "lowbit_cache")


def temporary_folder() -> Path:
    """Folder of this process's own, for quantized files that are not to be kept; removes those of dead processes."""
    parent = cache_folder()
    for other in parent.glob(f"{_TEMPORARY}*"):
        process = other.name.removeprefix(_TEMPORARY)
        if process.isdigit() and not psutil.pid_exists(int(process)):
            with contextlib.suppress(OSError):
                shutil.rmtree(other)
    return parent / f"{_TEMPORARY}{os.getpid()}"


def model_names(folder: str) -> list[str]:
    """What a loader offers from a models folder: core's list, and sharded sets by their index."""
    names = set(folder_paths.get_filename_list(folder))
    for root in folder_paths.get_folder_paths(folder):
        for index in Path(root).rglob(f"*{INDEX_SUFFIX}"):
            names.add(index.relative_to(root).as_posix())
    return sorted(names)


def model_path(folder: str, name: str) -> Path:
    """Full path of `name` in a models folder.

    Raises:
        CheckpointError: it is not there, or lies outside the folder.
    """
    for root in folder_paths.get_folder_paths(folder):
        candidate = Path(root) / name
        inside = candidate.resolve().is_relative_to(Path(root).resolve()) or candidate.is_symlink()
        if candidate.is_file() and ".." not in Path(name).parts and (inside or not Path(name).is_absolute()):
            return candidate
    raise CheckpointError(f"{name} is not in the {folder} folder: refresh the list or check the file's name.")
