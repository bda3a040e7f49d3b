"""A layer as one operator: torch.compile sees an input and an output, and nothing of the weight between them."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ...kernels.operators import register_own_operator

_LAYERS: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count(1 << 40)
"""No other size in a graph is one of these: the compiler takes equal sizes for one and the same."""


class OpaqueHandle:
    """A number by which the operator finds a module, forgotten with it; a copied module has one of its own.

    It is the size of a tensor without memory. The compiler takes a module's integers for constants, so that each of a
    model's blocks would be compiled anew; of a size it finds out that it varies.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        number = next(_numbers)
        _LAYERS[number] = module
        with torch.inference_mode(False):
            self.sized = torch.empty((), device="meta").expand(number)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueHandle:
        module = _LAYERS[self.sized.shape[0]]
        return OpaqueHandle(memo.get(id(module), module))


def _run(x: torch.Tensor, number: int, columns: int, activation: str) -> torch.Tensor:
    # Inductor puts other values into a tensor's memory, and the tensor is the same to see: a tensor of its own for each
    # call, or the linears of one input would take what they quantized of the old values.
    x = x.view_as(x)
    layer: Any = _LAYERS[number]
    # Not the module's call: the compiler has traced its hooks, and the forward that a bypass LoRA puts in place of this one.
    forward = type(layer).forward
    out = forward(layer, x, activation=activation) if activation else forward(layer, x)
    # The compiler has traced a plain tensor, and its graphs take no other.
    return out.as_subclass(torch.Tensor)


def _fake(x: torch.Tensor, number: int, columns: int, activation: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_SCHEMA = "(Tensor x, SymInt number, int columns, str activation) -> Tensor"
_layer = register_own_operator("layer", _SCHEMA, _run, _fake)


def opaque_layer(x: torch.Tensor, handle: OpaqueHandle, columns: int, activation: str | None = None) -> torch.Tensor:
    """The call of the module that `handle` is of: x (..., K) -> (..., columns), as it runs uncompiled.

    Page faults, casts and LoRAs happen inside: no graph depends on them, and no gradient reaches them.
    """
    return _layer(x, handle.sized.shape[0], columns, activation or "")


class OpaqueWhilePaged(torch.nn.Module):
    """Mixin over core's linears and norms in 16 bits: one operator too, where dynamic VRAM has their weights in pages.

    The compiler cannot trace core's calls for a page. Weights of up to 16 KiB have none.
    """

    handle: OpaqueHandle

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Core's."""
        if torch.compiler.is_compiling() and hasattr(self, "_v") and not (args or kwargs or torch.is_grad_enabled()):
            return opaque_layer(x, self.handle, getattr(self, "out_features", x.shape[-1]))
        return super().forward(x, *args, **kwargs)


def is_opaque_while_paged(module: Any) -> bool:
    """Whether the mixin fits: one of core's layers that cast their weights, and whose output's shape it knows."""
    fits = isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)) or hasattr(module, "out_features")
    return fits and hasattr(module, "forward_comfy_cast_weights")
