"""What this folder takes from comfy-kitchen: without one of NEEDED quantized weights cannot be loaded at all."""

from __future__ import annotations

from ..versions import dotted

NEEDED = dotted(
    {
        "comfy_kitchen": "int8_linear quantize_mxfp8 quantize_nvfp4 scaled_mm_mxfp8 scaled_mm_nvfp4 use_backend",
        "comfy_kitchen.registry": "registry",
        "comfy_kitchen.tensor": "QuantizedTensor TensorCoreFP8Layout register_layout_class",
        "comfy_kitchen.tensor.base": "LAYOUTS get_layout_class",
        "comfy_kitchen.tensor.convrot_w4a4": "convrot_w4a4_linear",
        "comfy_kitchen.tensor.w4a8_int8": "w4a8_int8_linear",
    }
)
OPTIONAL: dict[str, str] = {}
"""Name -> what is lost without it."""
