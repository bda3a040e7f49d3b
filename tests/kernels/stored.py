"""Random stored weights of every kind, for the kernel tests."""

from __future__ import annotations

import dataclasses

import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.kernels.stored_weight import StoredWeight
from lowbit.ops.layouts import register_layouts
from lowbit.ops.linear_weight import stored_weight

register_layouts()

MAKERS = {
    "e4m3": ("TensorCoreFP8Layout", {}),
    "e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_tensor": ("TensorWiseINT8Layout", {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "int4": ("TensorCoreConvRotW4A4Layout", {}),
    "int4_codebook": ("AsymW4A8Int8Layout", {}),
    "int4_grid": ("AsymW4A8Int8Layout", {"codebook": False, "scale_dtype": torch.float32}),
}
ROTATED = ("int8_convrot", "int4", "int4_codebook", "int4_grid")
UNROTATED = tuple(name for name in MAKERS if name not in ROTATED)


def make(name: str, rows: int, columns: int, device: torch.device) -> StoredWeight:
    """A random weight with outliers, quantized by comfy-kitchen (rotated kinds need columns % 256 == 0)."""
    layout, options = MAKERS[name]
    values = torch.randn(rows, columns) * 0.05 * torch.exp(torch.randn(rows, columns))
    stored = stored_weight(QuantizedTensor.from_float(values, layout, **options))
    assert stored is not None
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(stored)
        if isinstance(value := getattr(stored, field.name), torch.Tensor)
    }
    return dataclasses.replace(stored, **moved)
