"""Reads one quantized layer of a file as the comfy-kitchen tensor it stands for."""

from __future__ import annotations

import json

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .formats import STORAGES, Storage
from .quantize import assemble
from .stored import ScaleTarget, StoredLayer

_SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook")


def read_layer(
    checkpoint: Checkpoint, layer: str, stored: StoredLayer, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    """The weight of `layer`, in host memory.

    Args:
        checkpoint: the file.
        layer: its name, without `.weight`.
        stored: what `find_stored` says of it.
        shape: (out_features, in_features), without the padding of a format.
        dtype: that it dequantizes to.

    Raises:
        CheckpointError: its format is unknown here.
    """
    storage_name = _storage_name(dict(stored.config))
    names = {suffix: f"{layer}.{suffix}" for suffix in _SUFFIXES} | dict(stored.scale_names)
    parts = {suffix: checkpoint.read(name) for suffix, name in names.items() if name in checkpoint.entries}
    target = ScaleTarget("weight_scale", STORAGES[storage_name].core_format)
    parts["weight_scale"] = target.convert(parts.get("weight_scale", torch.ones(())))
    for suffix, scale_dtype in _block_scale_dtypes(STORAGES[storage_name]).items():
        parts[suffix] = parts[suffix].view(scale_dtype)
    return assemble(parts, storage_name, shape, dtype)


def _block_scale_dtypes(storage: Storage) -> dict[str, torch.dtype]:
    """Block scales may lie in the file as bytes."""
    return {
        "mxfp8": {"weight_scale": torch.float8_e8m0fnu},
        "nvfp4": {"weight_scale": torch.float8_e4m3fn},
    }.get(storage.core_format, {})


def _storage_name(config: dict[str, object]) -> str:
    params = config.get("params")
    rotated = config.get("convrot") or (isinstance(params, dict) and params.get("convrot"))
    for name, storage in STORAGES.items():
        if storage.core_format == config["format"] and bool(storage.core_config.get("convrot")) == bool(rotated):
            return name
    raise CheckpointError(f"The format {json.dumps(config)} is unknown to this version of Lowbit: update it.")
