"""Loads a VAE through core, in a chosen precision."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from ...errors import CheckpointError
from ...ops.checkpoint import open_checkpoint
from .checked import settle, watched
from .loading import read_stored_file

VAE_PRECISIONS: Mapping[str, torch.dtype | None] = MappingProxyType(
    {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)
"""Choices of the node and the dtype each stands for; None leaves it to core."""


def _core_loader() -> Any:
    """Core's VAELoader node; `nodes` is core's module, not this pack's folder."""
    return importlib.import_module("nodes").VAELoader


def vae_names() -> list[str]:
    """Core's list: files of models/vae, approximations and its built-ins."""
    loader = _core_loader()
    return loader.vae_list(loader)


def load_vae(name: str, precision: str) -> comfy.sd.VAE:
    """Load a VAE.

    Raises:
        CheckpointError: the file is damaged, holds NaN or Inf, is no VAE, or a precision was asked for one of core's built-ins.
    """
    dtype = VAE_PRECISIONS[precision]
    path = folder_paths.get_full_path("vae", name)
    if path is not None:
        open_checkpoint(path)
    if dtype is None and path is None:
        return _core_loader()().load_vae(name)[0]
    if path is None:
        raise CheckpointError(f"The VAE {name} is built into ComfyUI: choose the precision 'auto'.")
    return _load(path, dtype)


def _load(path: str, dtype: torch.dtype | None) -> comfy.sd.VAE:
    name = Path(path).name
    state_dict, metadata, numbers = read_stored_file(path)
    with watched(name) as arrivals:
        vae = comfy.sd.VAE(sd=state_dict, metadata=metadata, dtype=dtype)
    if vae.first_stage_model is None:
        raise CheckpointError(f"{name} is no VAE that this ComfyUI knows: check the file or update ComfyUI.")
    settle(arrivals, name, optional_parts=True)
    numbers.settle(vae.patcher)
    vae.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    return vae


def _load_patcher(
    path: str, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return _load(path, dtype).patcher
