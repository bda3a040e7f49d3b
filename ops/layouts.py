"""Registers the comfy-kitchen layouts that core-format checkpoints name, where ComfyUI has not done so."""

from __future__ import annotations

from functools import partial

import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout, register_layout_class
from comfy_kitchen.tensor.base import LAYOUTS


class Float8E5M2Layout(TensorCoreFP8Layout):
    """E5M2 weights (finite range 57344) under the layout name that ComfyUI uses for them; otherwise as the E4M3 layout."""

    quantize = staticmethod(partial(TensorCoreFP8Layout.quantize, dtype=torch.float8_e5m2))


def register_layouts() -> None:
    """Make every layout name of DESIGN's format table resolvable.

    ComfyUI registers its own subclasses (with stochastic rounding) under the same names; those are left as they are.
    """
    for name, layout in (
        ("TensorCoreFP8E4M3Layout", TensorCoreFP8Layout),
        ("TensorCoreFP8E5M2Layout", Float8E5M2Layout),
    ):
        if name not in LAYOUTS:
            register_layout_class(name, layout)
