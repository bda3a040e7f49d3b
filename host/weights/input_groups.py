"""Tells quantized linears which of their neighbours read the very same tensor, so that they quantize it once."""

from __future__ import annotations

import torch

from ...ops.shared_input import FIRST
from .operations import QuantizedLinear

INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q", "k", "v", "k_img", "v_img"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("to_query", "to_key", "to_value"),
    ("q_proj", "k_proj", "v_proj"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("w1", "w3"),
    ("gate_proj", "up_proj"),
)
"""Names of children of one module that ComfyUI's models call one after the other; what differs in its input is not shared."""


def group_inputs(model: torch.nn.Module) -> int:
    """Set `input_group` of every quantized linear that a row of `INPUT_GROUPS` names; returns how many."""
    grouped = 0
    for module in model.modules():
        children = dict(module.named_children())
        for names in INPUT_GROUPS:
            members = [linear for name in names if isinstance(linear := children.get(name), QuantizedLinear)]
            for place, linear in enumerate(members if len(members) > 1 else ()):
                linear.input_group = names[0] if place else FIRST + names[0]
                grouped += 1
    return grouped
