"""Hands a feed-forward block's activation to the linear after it, which quantizes its input in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import torch

from ...versions import find
from ..in_front import class_in_front, route
from .operations import INPUT_ACTIVATIONS, QuantizedLinear, takes_activation


class FusedQwenFeedForward(torch.nn.Module):
    """Mixin over core's MLP of Qwen-Image, whose dropout does nothing in inference: the GELU rides in the quantizer behind it."""

    net: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        down = self.net[2]
        if takes_activation(down):
            return down(self.net[0].proj(hidden_states), activation="gelu_tanh")
        return super().forward(hidden_states, *args, **kwargs)


def fuse_feed_forwards(model: torch.nn.Module) -> int:
    """Replace the class of every MLP of Qwen-Image that is built as expected; returns how many."""
    core = find("comfy.ldm.qwen_image.model.FeedForward")
    blocks: list[Any] = [module for module in model.modules() if core is not None and type(module) is core]
    blocks = [block for block in blocks if len(block.net) == 3 and getattr(block.net[0], "approximate", None) == "tanh"]
    for block in blocks:
        block.__class__ = class_in_front(core, FusedQwenFeedForward)
    return len(blocks)


def route_input_activations() -> None:
    """Have core's `linear_input_act` leave linears of ours to their own forward; any other goes on as before.

    Wan, LTX, MiniMax and Llama-like text encoders end their MLPs with that function, which multiplies INT8 weights itself
    with quantized activations, whatever the format asks for. Ours quantize the activation's output in the same pass.
    """
    if find("comfy.ops.INPUT_ACT_EAGER") is not None:
        route("comfy.ops.linear_input_act", _linear_input_act)


def _linear_input_act(
    core: Callable[[Any, torch.Tensor, str], torch.Tensor], linear: Any, x: torch.Tensor, input_act: str
) -> torch.Tensor:
    if not isinstance(linear, QuantizedLinear):
        return core(linear, x, input_act)
    if input_act in INPUT_ACTIVATIONS and takes_activation(linear):
        return linear(x, activation=input_act)
    return linear(comfy.ops.INPUT_ACT_EAGER[input_act](x))
