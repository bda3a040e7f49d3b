"""act(gate) * up of a gated feed-forward, for a few rows in one launch."""

from __future__ import annotations

import torch

from .launch import launch
from .quantize_rows import activate, apply_activation
from .runtime import ceil_div, kernels_run_on, tl, triton


@triton.jit
def _gate_rows_kernel(gate_ptr, up_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    element: tl.constexpr = out_ptr.dtype.element_ty
    gate = activate(tl.load(gate_ptr + index, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    up = tl.load(up_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (gate.to(element).to(tl.float32) * up).to(element), mask=inside)


def gate_rows(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, elementwise, rounded after the activation as plain torch does.

    Args:
        gate, up: contiguous, of one shape and dtype.
        activation: "silu" or "gelu_tanh".
    """
    if not kernels_run_on(gate):
        return apply_activation(gate, activation) * up
    out = torch.empty_like(gate)
    count, block = gate.numel(), 512
    constants = {"ACTIVATION": activation, "BLOCK": block}
    launch(_gate_rows_kernel, (ceil_div(count, block), 1, 1), (gate, up, out, count), constants)
    return out
