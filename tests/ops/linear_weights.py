"""Quantized weights of every format, for the tests of `quantized_linear`."""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.layouts import register_layouts

register_layouts()

FORMATS = {
    "fp8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "fp8_plain": ("TensorCoreFP8Layout", {}),
    "fp8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_tensor": ("TensorWiseINT8Layout", {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "int4_convrot": ("TensorCoreConvRotW4A4Layout", {}),
    "int4_asym": ("AsymW4A8Int8Layout", {}),
    "int4_corrected": ("AsymW4A8Int8Layout", {"symmetric": False}),
}
N, K = 24, 256


def random_weight(name: str, n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """A random (n, k) weight in the format `name`, always the same."""
    layout, options = FORMATS[name]
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    return QuantizedTensor.from_float(values, layout, **options)


WEIGHTS = {name: random_weight(name) for name in FORMATS}
