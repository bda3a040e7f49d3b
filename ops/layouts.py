"""Registers the comfy-kitchen layouts that core-format checkpoints name, where ComfyUI has not done so."""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout, register_layout_class
from comfy_kitchen.tensor.base import LAYOUTS


class Float8E5M2Layout(TensorCoreFP8Layout):
    """E5M2 weights under the layout name that ComfyUI uses for them."""

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: torch.Tensor | float | str | None = None,
        dtype: torch.dtype = torch.float8_e5m2,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As the E4M3 layout, stored as float8_e5m2 (finite range 57344)."""
        return super().quantize(tensor, scale=scale, dtype=dtype, **kwargs)


def register_layouts() -> None:
    """Make every layout of `formats.STORAGES` known to comfy-kitchen.

    ComfyUI registers its own subclasses (with stochastic rounding) under the same names; those are left as they are.
    """
    for name, layout in (
        ("TensorCoreFP8E4M3Layout", TensorCoreFP8Layout),
        ("TensorCoreFP8E5M2Layout", Float8E5M2Layout),
    ):
        if name not in LAYOUTS:
            register_layout_class(name, layout)
