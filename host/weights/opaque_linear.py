"""A quantized linear as one operator: torch.compile sees an input and an output, and nothing of the weight between them."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ...kernels.operators import register_own_operator

_LINEARS: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count(1 << 40)
"""No other size in a graph is one of these: the compiler takes equal sizes for one and the same."""


class OpaqueHandle:
    """A number by which the operator finds a module, forgotten with it; a copied module has one of its own.

    It is the size of a tensor without memory. The compiler takes a module's integers for constants, so that each of a
    model's blocks would be compiled anew; of a size it finds out that it varies.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        number = next(_numbers)
        _LINEARS[number] = module
        with torch.inference_mode(False):
            self.sized = torch.empty((), device="meta").expand(number)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueHandle:
        module = _LINEARS[self.sized.shape[0]]
        return OpaqueHandle(memo.get(id(module), module))


def _run(x: torch.Tensor, number: int, rows: int, activation: str) -> torch.Tensor:
    # Inductor puts other values into a tensor's memory, and the tensor is the same to see: a tensor of its own for each
    # call, or the linears of one input would take what they quantized of the old values.
    return _LINEARS[number](x.view_as(x), activation=activation or None)


def _fake(x: torch.Tensor, number: int, rows: int, activation: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_linear = register_own_operator(
    "module_linear", "(Tensor x, SymInt number, int rows, str activation) -> Tensor", _run, _fake
)


def opaque_linear(x: torch.Tensor, handle: OpaqueHandle, rows: int, activation: str | None) -> torch.Tensor:
    """The call of the module that `handle` is of: x (..., columns) -> (..., rows), as it runs uncompiled.

    Page faults, casts and LoRAs happen inside: no graph depends on them.
    """
    return _linear(x, handle.sized.shape[0], rows, activation or "")
