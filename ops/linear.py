"""x @ W.T + bias for a quantized W: the one call the rest of the pack makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import FormatError
from ..kernels.quantize_rows import ACTIVATIONS, apply_activation
from .linear_reference import linear_reference
from .linear_weight import stored_weight


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    fast: bool = True,
    activation: str | None = None,
) -> torch.Tensor:
    """act(x) @ weight.T + bias, for x (..., K) of any rank, strides and alignment.

    Args:
        x: floating point, last dimension K.
        weight: (N, K) comfy-kitchen `QuantizedTensor` of any layout in `linear_weight.LAYOUT_READERS`; any other
            tensor is multiplied by `torch.nn.functional.linear`.
        bias: (N,) or None.
        fast: quantize x too, row by row, and multiply on low-precision tensor cores where the GPU has them. False:
            only the weight is quantized and the product is 16-bit.
        activation: None, "gelu_tanh" or "silu", applied to x first.

    Returns:
        (..., N) in x's dtype.

    Raises:
        FormatError: x's last dimension is not the weight's K, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise FormatError(f"activation must be one of {ACTIVATIONS}, not '{activation}'.")
    stored = stored_weight(weight)
    if stored is None:
        return F.linear(apply_activation(x, activation), weight, bias)
    if x.dim() == 0 or x.shape[-1] != stored.columns:
        raise FormatError(
            f"An input of shape {tuple(x.shape)} cannot be multiplied by a weight of {stored.rows} x {stored.columns}: "
            f"its last dimension must be {stored.columns}."
        )
    return linear_reference(x, stored, bias, fast=fast, activation=activation)
