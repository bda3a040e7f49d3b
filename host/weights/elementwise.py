"""Puts modulation, gates, norms, rotary embeddings and joined heads through the pack's kernels, near the memory's rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from torch.utils._pytree import tree_map_only

from ...kernels.join_heads import join_heads
from ...kernels.modulate_rows import modulate_rows
from ...kernels.normalize import normalize
from ...kernels.operators import register_operator
from ...kernels.rope import rope
from ...kernels.runtime import AMPERE, compute_capability
from ...versions import find
from ..in_front import class_in_front, named_alike, route
from .operations import QuantizedLinear


def _stays_with_torch(x: torch.Tensor) -> bool:
    """A compiler fuses better, and a gradient needs PyTorch's own.

    Kernels are launched on the current GPU, and before Ampere Triton does not compile all of them.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    index = x.device.index
    return x.is_cuda and (index != torch._C._cuda_getDevice() or compute_capability(index) < AMPERE)


class _Norm(torch.nn.Module):
    """Mixin over core's LayerNorm and RMSNorm."""

    weight: torch.Tensor | None
    eps: float | None
    normalized_shape: tuple[int, ...]

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        x = _as_it_lies(input)
        if _stays_with_torch(x) or x.shape[-1:] != self.normalized_shape:
            return super().forward_comfy_cast_weights(input)  # type: ignore[misc]
        held, centered = None if self.weight is None else self, isinstance(self, torch.nn.LayerNorm)
        with comfy.ops.CastBiasWeightContext(held, x, offloadable=True) as (weight, bias):
            # What adds a bias to core's RMSNorm adds it itself.
            return normalize(x, weight, bias if centered else None, self.eps, centered=centered)


class _QwenBlock(torch.nn.Module):
    """Mixin over core's block of Qwen-Image."""

    def _modulate(
        self, x: torch.Tensor, mod_params: torch.Tensor, timestep_zero_index: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if timestep_zero_index is not None or _stays_with_torch(x):
            return super()._modulate(x, mod_params, timestep_zero_index)  # type: ignore[misc]
        shift, scale, gate = mod_params.unsqueeze(1).chunk(3, dim=-1)
        return modulate_rows(shift, x, 1 + scale), gate

    def _apply_gate(
        self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, timestep_zero_index: Any = None
    ) -> torch.Tensor:
        if timestep_zero_index is not None or _stays_with_torch(x):
            return super()._apply_gate(x, y, gate, timestep_zero_index)  # type: ignore[misc]
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


class _Heads(torch.Tensor):
    """What a projection of Qwen-Image gives, on its way by heads: core puts heads in front of tokens, and joins texts and image."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.contiguous and len(args) == 1 and not kwargs:
                return args[0].as_subclass(_ContiguousLater)
            joins = func is torch.cat and len(args) == 1 and len(args[0]) == 2 and kwargs == {"dim": 2}
            if joins and not _stays_with_torch(args[0][0]):
                return join_heads(*args[0])
            out = func(*args, **(kwargs or {}))
        return out.as_subclass(cls) if func in (torch.Tensor.view, torch.Tensor.transpose) else out


class _ContiguousLater(torch.Tensor):
    """Contiguous from when anybody looks at it, which takes a copy; our norm reads it as it lies, and gives what is contiguous."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            # In its own place, since `func` may write to it.
            tree_map_only(cls, lambda x: x.set_(x.contiguous()), (args, kwargs))
            return func(*args, **(kwargs or {}))


_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Of Qwen-Image's attention."""


def _as_it_lies(x: torch.Tensor) -> torch.Tensor:
    if type(x) is not _ContiguousLater:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def speed_up_elementwise(model: torch.nn.Module) -> None:
    """Give norms and blocks of `model` this pack's arithmetic.

    What blocks call for rotary embeddings, and those of Wan and Flux for modulation, are functions of ComfyUI's: ours go in
    front of them for all models.
    """
    module: Any
    for name, mixin in _CLASSES.items():
        core_class = find(name, ())
        kinds = {kind for kind in map(type, model.modules()) if issubclass(kind, core_class)}
        kinds = {kind for kind in kinds if _computes_alike(kind, core_class, mixin)}
        for module in model.modules():
            if type(module) in kinds:
                module.__class__ = class_in_front(type(module), mixin)
    attention = find("comfy.ldm.qwen_image.model.Attention", ())
    for module in model.modules():
        for name, child in module.named_children() if isinstance(module, attention) else ():
            if name in _PROJECTIONS and isinstance(child, QuantizedLinear):
                child.output_class = _Heads
    for name, in_front in _FUNCTIONS.items():
        route(name, in_front)


def _computes_alike(kind: type, core_class: type, mixin: type) -> bool:
    """Whether a class that may be made of core's, by another pack too, still has the methods that `mixin` stands in for."""
    methods = [(name, own) for name, own in vars(mixin).items() if inspect.isfunction(own)]
    return all(
        getattr(kind, name, None) is getattr(core_class, name, kind) and named_alike(getattr(kind, name), own)
        for name, own in methods
    )


def _repeat_e(core: Callable[..., torch.Tensor], e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = core(e, x)
    return rows if _stays_with_torch(x) or rows.shape[1] != 1 else rows.as_subclass(_RowFactor)


def _apply_mod(
    core: Callable[..., torch.Tensor],
    tensor: torch.Tensor,
    m_mult: torch.Tensor,
    m_add: torch.Tensor | None = None,
    modulation_dims: Any = None,
) -> torch.Tensor:
    if m_add is None or modulation_dims is not None or _stays_with_torch(tensor):
        return core(tensor, m_mult, m_add, modulation_dims)
    return modulate_rows(m_add, tensor, m_mult)


def _turned(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor | None:
    """`x` turned by this pack, in a graph by its operator; None where it is left to core."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return torch.ops.lowbit.rope(x, freqs_cis)
    return None if _stays_with_torch(x) else rope(x, freqs_cis)


def _apply_rope1(core: Callable[..., torch.Tensor], x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    turned = _turned(x, freqs_cis)
    return core(x, freqs_cis) if turned is None else turned


def _apply_rope(core: Callable[..., Any], xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> Any:
    q = _turned(xq, freqs_cis)
    k = None if q is None else _turned(xk, freqs_cis)
    return core(xq, xk, freqs_cis) if k is None else (q, k)


_APPLY_ROPE1 = "comfy.ldm.flux.math.apply_rope1"


def _run_rope(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    turned = _turned(x, freqs_cis)
    return find(_APPLY_ROPE1)(x, freqs_cis).contiguous() if turned is None else turned


# Nothing is lost to the compiler: core's own is an operator of comfy-kitchen's.
register_operator(
    "rope", "rope(Tensor x, Tensor freqs_cis) -> Tensor", _run_rope, lambda x, freqs_cis: x.new_empty(x.shape)
)


_CLASSES = {
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": _QwenBlock,
    "comfy.ops.disable_weight_init.LayerNorm": _Norm,
    "comfy.ops.disable_weight_init.RMSNorm": _Norm,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "comfy.ldm.flux.layers.apply_mod": _apply_mod,
    "comfy.ldm.flux.math.apply_rope": _apply_rope,
    _APPLY_ROPE1: _apply_rope1,
    "comfy.ldm.wan.model.repeat_e": _repeat_e,
}
