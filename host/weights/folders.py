"""Where ComfyUI keeps models, and where this pack keeps the quantized files it makes."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import folder_paths

from ...errors import CheckpointError
from ...ops.checkpoint import INDEX_NAME
from ...ops.gguf_file import SUFFIX

CACHE_VARIABLE = "LOWBIT_CACHE_DIR"
"""Environment variable that names the folder for quantized files."""

_OF_COMFYUI_GGUF: Mapping[str, str] = MappingProxyType({"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf"})
"""Folder of models -> what ComfyUI-GGUF, or a user's extra_model_paths.yaml for it, calls further folders with GGUF files."""


def cache_folder() -> Path:
    """Folder of quantized files: `$LOWBIT_CACHE_DIR`, or `lowbit_cache` in ComfyUI's models folder."""
    # A shell has put the home folder in; a container's settings or a service's have not.
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(folder_paths.models_dir) / "lowbit_cache"


def _gguf_folder(folder: str) -> list[str]:
    """The further folder of a folder of models, if there is one."""
    further = _OF_COMFYUI_GGUF.get(folder, "")
    return [further] if further in folder_paths.folder_names_and_paths else []


def model_names(folder: str) -> list[str]:
    """What a loader offers from a models folder: core's list, sharded sets by their index, and GGUF files."""
    names = set(folder_paths.get_filename_list(folder))
    for further in _gguf_folder(folder):
        names |= {name for name in folder_paths.get_filename_list(further) if _is_ours(Path(name).name)}
    # Core walks the tree, links included, and walks it again only when a folder's time changes: so do we.
    _, folders, _ = folder_paths.filename_list_cache.get(folder) or folder_paths.get_filename_list_(folder)
    return sorted(names | _further(tuple(folder_paths.get_folder_paths(folder)), tuple(folders.items())))


@functools.lru_cache(maxsize=16)
def _further(roots: tuple[str, ...], folders: tuple[tuple[str, float], ...]) -> frozenset[str]:
    """Indices of sharded sets and GGUF files in `folders` (path and time of last change), relative to their roots."""
    found = set()
    for folder, _ in folders:
        root = next((root for root in roots if Path(folder).is_relative_to(root)), None)
        if root is not None and os.path.isdir(folder):
            relative = Path(folder).relative_to(root)
            found |= {(relative / name).as_posix() for name in os.listdir(folder) if _is_ours(name)}
    return frozenset(found)


def _is_ours(name: str) -> bool:
    """Whether a loader reads a file that core's lists leave out; a vision tower comes with its text encoder."""
    gguf = name.lower().endswith(SUFFIX) and "mmproj" not in name.lower()
    return gguf or INDEX_NAME.match(name) is not None


def model_path(folder: str, name: str) -> Path:
    """Full path of `name` in a models folder.

    Raises:
        CheckpointError: it is not there, or lies outside the folder.
    """
    for root in (root for key in (folder, *_gguf_folder(folder)) for root in folder_paths.get_folder_paths(key)):
        candidate = Path(root) / name
        inside = candidate.resolve().is_relative_to(Path(root).resolve()) or candidate.is_symlink()
        if os.path.isfile(candidate) and ".." not in Path(name).parts and (inside or not Path(name).is_absolute()):
            return candidate
    raise CheckpointError(f"{name} is not in the {folder} folder: refresh the list or check the file's name.")
