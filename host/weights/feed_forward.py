"""Hands a feed-forward block's activation to the linear after it, which quantizes its input in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch

from ...versions import find
from .operations import INPUT_ACTIVATIONS, QuantizedLinear, takes_activation

_ROUTED = "_lowbit_routed"


class FusedWanFeedForward(torch.nn.Module):
    """Mixin over core's block, a Sequential; with a quantized down-projection the GELU rides in its input quantizer, whatever the format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        up, _, down = self.children()
        if takes_activation(down):
            return down(up(x), activation="gelu_tanh")
        return super().forward(x)


class FusedQwenFeedForward(torch.nn.Module):
    """As above for Qwen-Image's MLP, whose dropout does nothing in inference."""

    net: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        down = self.net[2]
        if takes_activation(down):
            return down(self.net[0].proj(hidden_states), activation="gelu_tanh")
        return super().forward(hidden_states, *args, **kwargs)


@dataclass(frozen=True)
class Fusion:
    """A core block, the class that replaces its own, and whether an instance is built as expected."""

    core: type[torch.nn.Module]
    fused: type[torch.nn.Module]
    fits: Callable[[Any], bool]


def _is_wan(module: Any) -> bool:
    return len(module) == 3 and isinstance(module[1], torch.nn.GELU)


def _is_qwen(module: Any) -> bool:
    return len(module.net) == 3 and getattr(module.net[0], "approximate", None) == "tanh"


def _fusions() -> Iterator[Fusion]:
    """Those of the table that this ComfyUI has the block of."""
    for name, mixin, fits in (
        ("comfy.ldm.wan.model.WanFeedForward", FusedWanFeedForward, _is_wan),
        ("comfy.ldm.qwen_image.model.FeedForward", FusedQwenFeedForward, _is_qwen),
    ):
        core = find(name)
        if core is not None:
            yield Fusion(core, type(mixin.__name__, (mixin, core), {"__module__": __name__}), fits)


FUSIONS = tuple(_fusions())


def fuse_feed_forwards(model: torch.nn.Module) -> int:
    """Replace the class of every block that a row of `FUSIONS` fits; returns how many."""
    fused = 0
    for module in model.modules():
        for fusion in FUSIONS:
            if type(module) is fusion.core and fusion.fits(module):
                module.__class__ = fusion.fused
                fused += 1
    return fused


def route_input_activations() -> None:
    """Have core's `linear_input_act` leave linears of ours to their own forward; any other goes on as before.

    LTX, MiniMax and Llama-like text encoders end their MLPs with that function, which multiplies INT8 weights itself
    with quantized activations, whatever the format asks for.
    """
    core, eager = find("comfy.ops.linear_input_act"), find("comfy.ops.INPUT_ACT_EAGER")
    if core is None or eager is None or getattr(core, _ROUTED, False):
        return

    def linear_input_act(linear: Any, x: torch.Tensor, input_act: str) -> torch.Tensor:
        if not isinstance(linear, QuantizedLinear):
            return core(linear, x, input_act)
        if input_act in INPUT_ACTIVATIONS and takes_activation(linear):
            return linear(x, activation=input_act)
        return linear(eager[input_act](x))

    setattr(linear_input_act, _ROUTED, True)
    comfy.ops.linear_input_act = linear_input_act
