"""Keeps a loaded text encoder's weights in place while a text is made, and multiplies straight from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.ops
import torch

from ...kernels.gate_rows import gate_rows
from ...text.linears import HeldLinears, Linear, Linears


class StreamedWeightsError(Exception):
    """A weight does not lie on the device unchanged: it is copied, or patched, at every use."""


class HeldWeights:
    """Weights of core's modules that stay where they are until `release`: resident, or pinned in dynamic VRAM."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the residual stream."""
        self.device, self.dtype = device, dtype
        self._pinned: list[tuple[Any, tuple]] = []

    def weight(self, module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, bias) of a Linear or an Embedding, in place.

        Raises:
            StreamedWeightsError: they are not on the device, or not what the module multiplies by.
        """
        if not _is_plain(module):
            raise StreamedWeightsError
        if hasattr(module, "_v") and module.weight.device != self.device:
            return self._pin(module)
        weight, bias = module.weight, getattr(module, "bias", None)
        if weight.device != self.device or (bias is not None and bias.device != self.device):
            raise StreamedWeightsError
        return weight, bias

    def linears(self, *modules: Any) -> Linears:
        """One callable for linears that share their input.

        Raises:
            StreamedWeightsError: as `weight`.
        """
        return HeldLinears(
            [Linear(*self.weight(module), getattr(module, "pre_quant_scale", None)) for module in modules]
        )

    def tensor(self, stored: torch.Tensor) -> torch.Tensor:
        """A small tensor of the model, on the device in the dtype of the residual stream."""
        return stored.to(self.device, self.dtype)

    def release(self) -> None:
        """Let dynamic VRAM move the weights again."""
        for module, state in self._pinned:
            comfy.ops.uncast_bias_weight(module, *state)
        self._pinned = []

    def _pin(self, module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The first cast of a weight may bring it in, and returns a copy where a LoRA was put on it: the second does not.
        for attempt in range(2):
            state = comfy.ops.cast_bias_weight(
                module,
                dtype=module.weight.dtype,
                device=self.device,
                bias_dtype=self.dtype,
                offloadable=True,
                compute_dtype=self.dtype,
                want_requant=True,
            )
            pinned = state[2] is not None and state[2][1] is not None
            in_place = pinned and state[0] is getattr(module, "_v_weight", None)
            if in_place:
                self._pinned.append((module, state))
                return state[0], state[1]
            comfy.ops.uncast_bias_weight(module, *state)
            if not pinned or attempt:
                break
        raise StreamedWeightsError


class StreamedWeights:
    """The same callables for weights that core copies or patches at every use: its own modules."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def linears(self, *modules: Any) -> Linears:
        """The modules themselves."""
        return ModuleLinears(modules)

    def tensor(self, stored: torch.Tensor) -> torch.Tensor:
        """As of `HeldWeights`."""
        return stored.to(self.device, self.dtype)

    def release(self) -> None:
        """Nothing is held."""


class ModuleLinears:
    """Linears that share their input, each core's own module."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, K) -> (1, N) of each."""
        return tuple(module(x) for module in self.modules)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(first) * second."""
        gate, up = self(x)
        return gate_rows(gate, up, activation)


def _is_plain(module: Any) -> bool:
    """Whether nothing but its weight decides what a module does: no hooks, no patches at use, no forward put over it."""
    return (
        "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and getattr(module, "side_product", None) is None
        and not getattr(module, "weight_function", None)
        and not getattr(module, "bias_function", None)
    )
