"""Reads one quantized layer of a file as the comfy-kitchen tensor it stands for."""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .checkpoint import Checkpoint
from .formats import STORAGES
from .quantize import assemble, storage_name_of
from .stored import ScaleTarget, StoredLayer
from .stored_scales import as_numbers

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
    storage_name = storage_name_of(stored.config)
    names = {suffix: f"{layer}.{suffix}" for suffix in _SUFFIXES} | dict(stored.scale_names)
    parts = {suffix: checkpoint.read(name) for suffix, name in names.items() if name in checkpoint.entries}
    target = ScaleTarget("weight_scale", STORAGES[storage_name].core_format)
    parts["weight_scale"] = target.convert(parts.get("weight_scale", torch.ones(())))
    core_format = STORAGES[storage_name].core_format
    parts = {suffix: as_numbers(suffix, part, core_format) for suffix, part in parts.items()}
    return assemble(parts, storage_name, shape, dtype)
