"""A layer as one operator: torch.compile sees an input and an output, and nothing of the weight between them."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ...kernels.operators import register_own_operator
from ...ops.shared_input import FIRST

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


_TICKET = "_lowbit_ticket"
_tickets = itertools.count(1)
_take_ticket = register_own_operator(
    "ticket",
    "(Tensor x) -> Tensor",
    lambda x: torch.tensor(next(_tickets)),
    lambda x: torch.empty((), dtype=torch.int64),
)


def ticket_for(x: torch.Tensor, input_group: str) -> torch.Tensor | None:
    """While a graph is traced: what its later runs tell this tensor's values by, for the linears of a group; None for others.

    Inductor puts other values into a tensor's memory, and the tensor is the same to see: only the graph knows.
    """
    if input_group.startswith(FIRST):
        setattr(x, _TICKET, _take_ticket(x))
    return getattr(x, _TICKET, None) if input_group else None


def _run(x: torch.Tensor, number: int, columns: int, activation: str, ticket: torch.Tensor | None) -> torch.Tensor:
    layer: Any = _LAYERS[number]
    options = {"activation": activation} if activation else {}
    if ticket is None:
        x = x.view_as(x)  # nobody takes it for one that was quantized
    else:
        options["input_group"] = str(ticket.item())
    # Not the module's call: the compiler has traced its hooks, and the forward that a bypass LoRA puts in place of this one.
    out = type(layer).forward(layer, x, **options)
    # The compiler has traced a plain tensor, and its graphs take no other.
    return out.as_subclass(torch.Tensor)


def _fake(x: torch.Tensor, number: int, columns: int, activation: str, ticket: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], columns))


_SCHEMA = "(Tensor x, SymInt number, int columns, str activation, Tensor? ticket) -> Tensor"
_layer = register_own_operator("layer", _SCHEMA, _run, _fake)


def opaque_layer(
    x: torch.Tensor,
    handle: OpaqueHandle,
    columns: int,
    activation: str | None = None,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    """The call of the module that `handle` is of: x (..., K) -> (..., columns), as it runs uncompiled.

    Page faults, casts and LoRAs happen inside: no graph depends on them, and no gradient reaches them. Linears that are given
    one ticket quantize x once.
    """
    return _layer(x, handle.sized.shape[0], columns, activation or "", ticket)


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
