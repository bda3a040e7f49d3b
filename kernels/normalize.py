"""LayerNorm and RMSNorm over the last dimension, of long rows and of the short ones of each head."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .attention_quantize import batch_and_head
from .launch import launch
from .repeated_launch import MOST_KINDS, RepeatedLaunch, Traits, traits_of
from .runtime import FLOATS, ceil_div, kernels_run_on, power_of_two, tl, triton

_LONGEST = 8192
_ELEMENTS = 4096
"""A program takes at least. PyTorch's takes one row, and is at a fifth of the memory's rate for a row of 128."""


@triton.jit
def row_places(head, position, heads, batch_stride, head_stride, row_stride):
    """Where the rows of a view by heads begin, of `head` among the heads of all samples."""
    batch, head = batch_and_head(head, heads)
    return batch * batch_stride + head * head_stride + position.to(tl.int64) * row_stride


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
    place = row_places(row // length, row % length, heads, batch_stride, head_stride, row_stride)
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
    parts = (None if part is None else traits_of(part) for part in (weight, bias))
    repeated = norm_launch(traits_of(x), *parts, eps, centered) if kernels_run_on(x) else None
    if repeated is not None:
        return repeated(x, weight, bias)
    if centered:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if eps is None else eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@functools.lru_cache(maxsize=MOST_KINDS)
def norm_launch(
    x: Traits, weight: Traits | None, bias: Traits | None, eps: float | None, centered: bool
) -> RepeatedLaunch | None:
    """What `normalize` launches for inputs of these traits; None: it is left to PyTorch."""
    fits = x.dtype in FLOATS and all(part is None or _fits(x, part) for part in (weight, bias))
    in_order = x.contiguous or (len(x.shape) == 4 and x.strides[-1] == 1)
    if not (fits and in_order and 0 < x.shape[-1] <= _LONGEST and x.elements and eps is not None):
        return None
    columns, rows = x.shape[-1], x.elements // x.shape[-1]
    _, heads, length, _ = x.shape if len(x.shape) == 4 else (1, 1, rows, columns)
    strides = x.strides[:3] if len(x.shape) == 4 else (0, 0, columns)
    block = power_of_two(columns)
    taken = max(1, _ELEMENTS // block)
    grid, numbers = (ceil_div(rows, taken), 1, 1), (rows, heads, length, *strides, eps)
    constants = {
        "K": columns,
        "ROWS": taken,
        "BLOCK_K": block,
        "CENTERED": centered,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
    }

    def launches(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        tensors = (x, x if weight is None else weight, x if bias is None else bias, out)
        launch(_normalize_kernel, grid, (*tensors, *numbers), constants)

    return RepeatedLaunch(launches, x.shape, x.dtype, x.device)


def _fits(x: Traits, part: Traits) -> bool:
    alike = part.dtype == x.dtype and part.device == x.device
    return alike and part.shape == x.shape[-1:] and part.contiguous
