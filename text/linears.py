"""Linears that share one input, for one token: together in one launch where a kernel takes them, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from ..kernels.gate_rows import gate_rows
from ..kernels.matvec_together import MOST_WEIGHTS, PLAIN, matvec_together
from ..kernels.runtime import ADA, INTERPRETED, compute_capability, kernels_run_on
from ..kernels.stored_weight import FP8, INT8
from ..ops.linear import quantized_linear
from ..ops.linear_weight import stored_weight


class Linears(Protocol):
    """(1, K) -> (1, N) of each linear."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(first) * second of two linears."""
        ...


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias, for a plain or a quantized weight that stays where it is.

    Attributes:
        weight: (N, K) tensor or comfy-kitchen `QuantizedTensor`.
        bias: (N,) or None.
        input_scale: multiplies x first, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(1, K) -> (1, N)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.input_scale is not None:
            x = x * self.input_scale.to(x)
        if hasattr(self.weight, "_layout_cls"):
            return quantized_linear(x, self.weight, bias, fast=False)
        return F.linear(x, self.weight.to(x.dtype), bias)


class HeldLinears:
    """Linears on weights that lie on the device and stay there."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = list(linears)
        self._together = _Together.of(self.linears)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, K) -> (1, N) of each."""
        if self._together is not None and x.shape[0] == 1:
            return self._together(x, None).split([linear.weight.shape[0] for linear in self.linears], dim=-1)
        return tuple(linear(x) for linear in self.linears)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(first) * second."""
        if self._together is not None and x.shape[0] == 1:
            return self._together(x, activation)
        gate, up = self(x)
        return gate_rows(gate, up, activation)


@dataclass(frozen=True)
class _Together:
    """The parts of linears that one launch takes."""

    kind: str
    weights: list[torch.Tensor]
    scales: list[torch.Tensor | None]
    biases: list[torch.Tensor | None]

    @classmethod
    def of(cls, linears: Sequence[Linear]) -> _Together | None:
        """None where the linears are too many, or not all alike and in plain rows."""
        parts = [_parts(linear) for linear in linears]
        if len(linears) > MOST_WEIGHTS or not kernels_run_on(linears[0].weight):
            return None
        kinds = {None if part is None else (part[0], part[1].dtype, _scale_mode(part[2])) for part in parts}
        with_bias = {linear.bias is None for linear in linears}
        if len(kinds) > 1 or None in kinds or len(with_bias) > 1:
            return None
        found = [part for part in parts if part is not None]
        if found[0][0] == FP8 and not _converts_e4m3(found[0][1]):
            return None
        kind = {INT8: "int8", FP8: "e4m3", PLAIN: PLAIN}[found[0][0]]
        biases = [linear.bias for linear in linears]
        return cls(kind, [part[1] for part in found], [part[2] for part in found], biases)

    def __call__(self, x: torch.Tensor, gate: str | None) -> torch.Tensor:
        """One row through all of them, or act(first) * second."""
        x = x.contiguous()
        total = sum(weight.shape[0] for weight in self.weights) if gate is None else self.weights[0].shape[0]
        out = torch.empty((1, total), dtype=x.dtype, device=x.device)
        kind, assembly = self.kind, not INTERPRETED
        matvec_together(x, self.weights, self.scales, self.biases, out, kind=kind, gate=gate, assembly=assembly)
        return out


def _parts(linear: Linear) -> tuple[str, torch.Tensor, torch.Tensor | None] | None:
    """(kind, codes, scale) of a weight whose rows are multiplied as they lie, or None."""
    weight = linear.weight
    if linear.input_scale is not None:
        return None
    if not hasattr(weight, "_layout_cls"):
        return (PLAIN, weight, None) if weight.is_floating_point() and weight.stride(-1) == 1 else None
    stored = stored_weight(weight)
    if stored is None or stored.kind not in (INT8, FP8) or stored.rotation or stored.data.stride(-1) != 1:
        return None
    if stored.data.dtype == torch.float8_e5m2:
        return None
    return stored.kind, stored.data, stored.scale


def _scale_mode(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else min(scale.numel(), 2)


def _converts_e4m3(data: torch.Tensor) -> bool:
    return not data.is_cuda or compute_capability(data.device.index or 0) >= ADA
