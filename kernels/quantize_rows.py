"""The row quantizer: one pass from 16- or 32-bit rows to e4m3 or int8 with a scale per row."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .hadamard import rotate_reference
from .launch import Launcher
from .runtime import power_of_two, tl, triton

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
    least, most = wide.aminmax(dim=1) if x.shape[1] else (wide.new_zeros(x.shape[0]),) * 2
    largest = torch.maximum(-least, most)
    scale = (largest / limit).clamp(min=SMALLEST_SCALE)
    scaled = wide * (1.0 / scale).unsqueeze(1)
    if dtype == torch.int8:
        scaled = scaled.nan_to_num_(nan=0.0).round_()
    return scaled.clamp_(-limit, limit).to(dtype), scale


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """x (float32) after the activation; gelu by its tanh form."""
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 1 - 2 / (exp(2u) + 1): exact at both infinities.
        x = 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _magnitude_bits(x):
    """|x| as int32 bits: their order is that of the magnitudes, with Inf and then NaN above every number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_scale(bits, limit, smallest):
    """(scale, 1 / scale) of rows whose largest magnitude has these bits; NaN and Inf stay."""
    scale = bits.to(tl.float32, bitcast=True) * (1.0 / limit)
    scale = tl.where(scale < smallest, smallest, scale)
    return scale, 1.0 / scale


@triton.jit
def _to_grid(x, INTEGER: tl.constexpr):
    """Scaled float32 values to int8 (nearest, ties to even) or e4m3 (saturating)."""
    # 1.5 * 2^23 leaves the rounded value in the low byte of the sum.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8) if INTEGER else x.to(tl.float8e4nv)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    weight_scale_ptr,
    stride_m,
    stride_k,
    M,
    limit,
    smallest,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FOLD_WEIGHT_SCALE: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = (row < M)[:, None]
    column = tl.arange(0, BLOCK_K)
    source = x_ptr + row[:, None] * stride_m + column.to(tl.int64)[None, :] * stride_k
    target = q_ptr + row[:, None] * K + column[None, :]
    if ONE_PASS:
        x = _activate(tl.load(source, mask=in_rows & (column < K)[None, :], other=0.0).to(tl.float32), ACTIVATION)
        largest = tl.max(_magnitude_bits(x), axis=1)
        scale, inverse = _row_scale(largest, limit, smallest)
        tl.store(target, _to_grid(x * inverse[:, None], INTEGER), mask=in_rows & (column < K)[None, :])
    else:
        bits = tl.zeros([ROWS, BLOCK_K], dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            here = in_rows & (column < K - start)[None, :]
            x = tl.load(source + stride_k * start, mask=here, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, _magnitude_bits(_activate(x, ACTIVATION)))
        largest = tl.max(bits, axis=1)
        scale, inverse = _row_scale(largest, limit, smallest)
        for start in range(0, K, BLOCK_K):
            here = in_rows & (column < K - start)[None, :]
            x = tl.load(source + stride_k * start, mask=here, other=0.0).to(tl.float32)
            tl.store(target + start, _to_grid(_activate(x, ACTIVATION) * inverse[:, None], INTEGER), mask=here)
    if FOLD_WEIGHT_SCALE:
        scale = scale * tl.load(weight_scale_ptr)
    tl.store(scale_ptr + row, scale, mask=row < M)


ONE_PASS_COLUMNS = 16384
"""Longest row that the kernel keeps in registers between finding its scale and storing it."""


def quantize_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    activation: str | None = None,
    weight_scale: torch.Tensor | None = None,
) -> None:
    """Quantize x (M, K), of any strides, to the row-major int8 or e4m3 `q` (M, K) and its `scale` (M,) float32.

    Args:
        x: float16, bfloat16 or float32.
        q: written; its dtype is the target's.
        scale: written; times `weight_scale` (one float32 element) where that is given.
        activation: applied to x first.
        weight_scale: tensor-wide weight scale to fold into the row scales.
    """
    folds = weight_scale is not None
    launcher = _quantizing(x.shape, x.stride(), q.dtype, activation, folds)
    launcher(x, q, scale, weight_scale if folds else scale)


@functools.lru_cache(maxsize=1024)
def _quantizing(
    shape: tuple[int, int],
    strides: tuple[int, int],
    target: torch.dtype,
    activation: str | None,
    folds: bool,
) -> Launcher:
    rows, columns = shape
    one_pass = columns <= ONE_PASS_COLUMNS
    return Launcher(
        _quantize_rows_kernel,
        (rows, 1, 1),
        (*strides, rows, LIMITS[target], SMALLEST_SCALE),
        {
            "K": columns,
            "BLOCK_K": power_of_two(columns) if one_pass else 4096,
            "ROWS": 1,
            "INTEGER": target == torch.int8,
            "ACTIVATION": activation,
            "FOLD_WEIGHT_SCALE": folds,
            "ONE_PASS": one_pass,
        },
        warps=4 if one_pass else 8,
    )
