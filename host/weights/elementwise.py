"""Puts modulation, gates and the norms of heads through the pack's kernels, where PyTorch's are far below the memory's rate."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch

from ...kernels.modulate_rows import modulate_rows
from ...kernels.norm_heads import norm_heads
from ...versions import find
from ..in_front import class_in_front

_ROUTED = "_lowbit_routed"


def _stays_with_torch() -> bool:
    """A compiler fuses better, and a gradient needs PyTorch's own."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


class _HeadNorm(torch.nn.Module):
    """Mixin over core's RMSNorm."""

    weight: torch.Tensor | None
    eps: float | None

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        core: Any = super()
        if _stays_with_torch():
            return core.forward_comfy_cast_weights(input)
        with comfy.ops.CastBiasWeightContext(None if self.weight is None else self, input, offloadable=True) as cast:
            return norm_heads(input, cast[0], self.eps)


class _QwenBlock(torch.nn.Module):
    """Mixin over core's block of Qwen-Image."""

    def _modulate(
        self, x: torch.Tensor, mod_params: torch.Tensor, timestep_zero_index: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if timestep_zero_index is not None or _stays_with_torch():
            core: Any = super()
            return core._modulate(x, mod_params, timestep_zero_index)
        shift, scale, gate = mod_params.unsqueeze(1).chunk(3, dim=-1)
        return modulate_rows(shift, x, 1 + scale), gate

    def _apply_gate(
        self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, timestep_zero_index: Any = None
    ) -> torch.Tensor:
        if timestep_zero_index is not None or _stays_with_torch():
            core: Any = super()
            return core._apply_gate(x, y, gate, timestep_zero_index)
        return modulate_rows(y, x, gate)


class _RowFactor(torch.Tensor):
    """A sample's shift, scale or gate in a block of Wan: `torch.addcmul` with one is this pack's; anything else as ever."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.addcmul and not kwargs:
                return modulate_rows(*args)
            out = func(*args, **(kwargs or {}))
        # The scale, one added to it, is multiplied by too.
        return out.as_subclass(cls) if func is torch.Tensor.__radd__ and type(args[1]) is int else out


def speed_up_elementwise(model: torch.nn.Module) -> int:
    """Give RMSNorms and blocks of `model` this pack's arithmetic; returns how many modules.

    What blocks of Wan and Flux call for their modulation is a function of ComfyUI's, which ours goes in front of for all models.
    """
    changed = 0
    module: Any
    for core_class, mixin in _CLASSES.items():
        for module in model.modules():
            if isinstance(module, find(core_class, ())):
                module.__class__ = class_in_front(type(module), mixin)
                changed += 1
    for name, in_front in _FUNCTIONS.items():
        _route(name, in_front)
    return changed


def _repeat_e(core: Callable[..., torch.Tensor], e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = core(e, x)
    return rows if _stays_with_torch() or rows.shape[1] != 1 else rows.as_subclass(_RowFactor)


def _apply_mod(
    core: Callable[..., torch.Tensor],
    tensor: torch.Tensor,
    m_mult: torch.Tensor,
    m_add: torch.Tensor | None = None,
    modulation_dims: Any = None,
) -> torch.Tensor:
    if m_add is None or modulation_dims is not None or _stays_with_torch():
        return core(tensor, m_mult, m_add, modulation_dims)
    return modulate_rows(m_add, tensor, m_mult)


_CLASSES = {
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": _QwenBlock,
    "comfy.ops.disable_weight_init.RMSNorm": _HeadNorm,
}
_FUNCTIONS = {"comfy.ldm.wan.model.repeat_e": _repeat_e, "comfy.ldm.flux.layers.apply_mod": _apply_mod}


def _route(full_name: str, in_front: Callable[..., torch.Tensor]) -> None:
    """Put a function in front of core's, in every module of core that has taken it under its name."""
    core, name = find(full_name), full_name.rpartition(".")[2]
    if core is None or getattr(core, _ROUTED, False):
        return

    @functools.wraps(core)
    def routed(*args: Any, **kwargs: Any) -> torch.Tensor:
        return in_front(core, *args, **kwargs)

    setattr(routed, _ROUTED, True)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("comfy.") and vars(module).get(name) is core:
            setattr(module, name, routed)
