"""Multiplies a stored weight out to plain numbers, for a layer that is no Linear and so never meets its scale again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .formats import STORAGES
from .quantize import assemble, storage_name_of

_WHOLE_CODES = frozenset({"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"})


@dataclass(frozen=True)
class ScaledWeight:
    """A weight that is stored as codes and one scale, and is no Linear's.

    Attributes:
        scale_name: the scale's name in the file.
        config: the weight's `comfy_quant` entries.
    """

    scale_name: str
    config: Mapping[str, Any]


def multiplied_out(name: str, codes: torch.Tensor, scale: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The weight `name` in float32, which holds every product exactly.

    Args:
        name: the weight, for errors.
        codes: its stored codes, of any shape, the first dimension being that of the outputs.
        scale: of one element, or one for each output.
        config: its `comfy_quant` entries.

    Raises:
        CheckpointError: it is packed, or the scale has another number of elements.
    """
    rows = codes.shape[0] if codes.dim() else 1
    if config["format"] not in _WHOLE_CODES or scale.numel() not in (1, rows):
        raise CheckpointError(
            f"'{name}' is stored as {config['format']} with a scale of shape {tuple(scale.shape)}, and its layer is no "
            "linear one, which ComfyUI could multiply with: use the 16-bit file."
        )
    storage_name = storage_name_of(config)
    scale = scale.float().reshape(()) if scale.numel() == 1 else scale.float().reshape(rows, 1)
    flat = codes.reshape(rows, -1).to(STORAGES[storage_name].dtype)
    parts = {"weight": flat, "weight_scale": scale}
    return assemble(parts, storage_name, tuple(flat.shape), torch.float32).dequantize().reshape(codes.shape)
