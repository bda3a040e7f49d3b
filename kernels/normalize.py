"""LayerNorm and RMSNorm over the last dimension, of long rows and of the short ones of each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .launch import launch
from .runtime import FLOATS, ceil_div, kernels_run_on, power_of_two, tl, triton

_LONGEST = 8192
_ELEMENTS = 4096
"""A program takes at least. PyTorch's takes one row, and is at a fifth of the memory's rate for a row of 128."""


@triton.jit
def _normalize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    heads,
    length,
    batch_stride,
    head_stride,
    row_stride,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program takes ROWS rows as they follow each other in the output."""
    lane = tl.arange(0, BLOCK_K)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (lane < K)[None, :]
    head = row // length
    place = (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    place += (row % length).to(tl.int64) * row_stride
    x = tl.load(x_ptr + place[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / K)[:, None], 0.0)
    out = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / K + eps))[:, None]
    if HAS_WEIGHT:
        out *= tl.load(weight_ptr + lane, mask=lane < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + lane, mask=lane < K, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * K + lane[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def normalize(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float | None, *, centered: bool
) -> torch.Tensor:
    """LayerNorm (`centered`) or RMSNorm over the last dimension, in float32, rounded once.

    Args:
        x: (..., K); (batch, heads, length, K) may be a view of another order.
        weight, bias: (K,) in x's dtype, or None; an RMSNorm has no bias.
        eps: added to the variance or mean square; None: the smallest step of x's dtype.

    Returns:
        x's shape, contiguous; by PyTorch's own function for rows of more than 8,192 elements, other dtypes and devices.
    """
    fits = x.dtype in FLOATS and all(part is None or _fits(x, part) for part in (weight, bias))
    ordered = x.is_contiguous() or (x.ndim == 4 and x.stride(-1) == 1)
    if not (fits and ordered and 0 < x.shape[-1] <= _LONGEST and x.numel() and eps is not None and kernels_run_on(x)):
        if centered:
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if eps is None else eps)
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, rows = x.shape[-1], x.numel() // x.shape[-1]
    _, heads, length, _ = x.shape if x.ndim == 4 else (1, 1, rows, columns)
    strides = x.stride()[:3] if x.ndim == 4 else (0, 0, columns)
    block = power_of_two(columns)
    taken = max(1, _ELEMENTS // block)
    tensors = (x, x if weight is None else weight, x if bias is None else bias, out)
    constants = {
        "K": columns,
        "ROWS": taken,
        "BLOCK_K": block,
        "CENTERED": centered,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
    }
    arguments = (*tensors, rows, heads, length, *strides, eps)
    launch(_normalize_kernel, (ceil_div(rows, taken), 1, 1), arguments, constants)
    return out


def _fits(x: torch.Tensor, part: torch.Tensor) -> bool:
    alike = part.dtype == x.dtype and part.device == x.device
    return alike and part.shape == x.shape[-1:] and part.is_contiguous()
