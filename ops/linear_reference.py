"""The quantized linear in plain torch: what every kernel is compared with, and what runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels.decode import decode_int8_reference, decode_reference, is_integer_grid
from ..kernels.quantize_rows import apply_activation, quantize_rows_reference
from ..kernels.stored_weight import StoredWeight


def linear_reference(
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    *,
    fast: bool,
    activation: str | None = None,
) -> torch.Tensor:
    """act(x) @ W.T + bias in plain torch, (..., K) -> (..., N) in x's dtype.

    Integer kinds run W8A8 when `fast`; every other case decodes the weight to x's dtype and multiplies.
    """
    if fast and is_integer_grid(weight) and x.dtype != torch.float64 and not _needs_grad(x, bias):
        return _int8_linear(x, weight, bias, activation)
    decoded = decode_reference(weight, x.dtype)
    return F.linear(apply_activation(x, activation), decoded, None if bias is None else bias.to(x.dtype))


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _int8_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    rows = x.reshape(-1, weight.columns)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], weight.rows))
    quantized, row_scale = quantize_rows_reference(rows, torch.int8, weight.rotation, activation)
    grid = decode_int8_reference(weight).contiguous()
    product = _int8_matmul(quantized, grid).float() * row_scale.unsqueeze(1) * weight.scale.float().reshape(1, -1)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def _int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) x (N, K) int8 -> (M, N) exact, int32 on the CPU; float64 sums where `_int_mm` does not take the shape."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    aligned = a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    if aligned and torch.cuda.get_device_capability(a.device) >= (7, 5):
        rows = a.shape[0]
        # It refuses fewer than 17 rows.
        padded = F.pad(a, (0, 0, 0, 32 - rows)) if rows <= 16 else a
        return torch._int_mm(padded, b.t())[:rows]
    return a.double() @ b.double().t()
