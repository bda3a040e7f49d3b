"""The row quantizer: one pass from 16- or 32-bit rows to e4m3 or int8 with a scale per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .hadamard import rotate_reference

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 2.0**-100
"""Rows below this times the limit quantize to zero: their reciprocal scale would overflow float32."""

ACTIVATIONS = (None, "gelu_tanh", "silu")


def apply_activation(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """x after `activation` (None, "gelu_tanh" or "silu"), same shape and dtype."""
    if activation is None:
        return x
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, not '{activation}'.")


def quantize_rows_reference(
    x: torch.Tensor, dtype: torch.dtype, rotation: int = 0, activation: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x (M, K) to `dtype` (float8_e4m3fn or int8) with one float32 scale per row (M,): x ~ q x scale.

    A row that holds NaN or Inf gets a scale that is NaN or Inf, so its outputs are not finite either.
    """
    wide = apply_activation(x.float(), activation)
    if rotation:
        wide = rotate_reference(wide, rotation)
    limit = LIMITS[dtype]
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(x.shape[0])
    scale = (largest / limit).clamp(min=SMALLEST_SCALE)
    scaled = wide * (1.0 / scale).unsqueeze(1)
    if dtype == torch.int8:
        scaled = torch.nan_to_num(scaled, nan=0.0).round()
    return scaled.clamp(-limit, limit).to(dtype), scale
