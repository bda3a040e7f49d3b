"""RMSNorm of many short rows, such as each head's of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .launch import launch
from .runtime import ceil_div, kernels_run_on, power_of_two, tl, triton

_LONGEST = 256
_ELEMENTS = 4096
"""A program takes; PyTorch's kernel takes one row, and is at a fifth of the memory's rate for a row of 128."""


@triton.jit
def _norm_heads_kernel(
    x_ptr,
    weight_ptr,
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
):
    """One program takes ROWS rows as they follow each other in the output."""
    lane = tl.arange(0, BLOCK_K)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (lane < K)[None, :]
    head = row // length
    place = (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    place += (row % length).to(tl.int64) * row_stride
    x = tl.load(x_ptr + place[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + lane, mask=lane < K, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / K + eps)
    out = (x * scale[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * K + lane[None, :], out, mask=inside)


def norm_heads(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """RMSNorm over the last dimension, in float32, rounded once: `F.rms_norm`.

    Args:
        x: (..., K); (batch, heads, length, K) may be a view of another order.
        weight: (K,) in x's dtype, or None.
        eps: added to the mean square; None: the smallest step of x's dtype.

    Returns:
        x's shape, contiguous; by `F.rms_norm` itself for rows of more than 256 elements, other dtypes and devices.
    """
    if not (_fits(x, weight) and eps is not None and kernels_run_on(x)):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, rows = x.shape[-1], x.numel() // x.shape[-1]
    _, heads, length, _ = x.shape if x.ndim == 4 else (1, 1, rows, columns)
    strides = x.stride()[:3] if x.ndim == 4 else (0, 0, columns)
    block = power_of_two(columns)
    taken = max(1, _ELEMENTS // block)
    constants = {"K": columns, "ROWS": taken, "BLOCK_K": block}
    arguments = (x, weight, out, rows, heads, length, *strides, eps)
    launch(_norm_heads_kernel, (ceil_div(rows, taken), 1, 1), arguments, constants)
    return out


def _fits(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    if weight is None or weight.dtype != x.dtype or weight.device != x.device or not x.numel():
        return False
    ordered = x.stride(-1) == 1 if x.ndim == 4 else x.is_contiguous()
    return ordered and x.shape[-1] <= _LONGEST and weight.is_contiguous() and weight.shape == x.shape[-1:]
