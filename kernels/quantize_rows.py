"""The row quantizer: one pass from 16- or 32-bit rows to e4m3 or int8 with a scale per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .hadamard import rotate_reference
from .launch import launch
from .runtime import INTERPRETED, ceil_div, constexpr, power_of_two, tl, triton

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 2.0**-100
"""Rows below this times the limit quantize to zero: their reciprocal scale would overflow float32."""

INTEGER_TERM = 254.0
"""What an int8 term counts for in units of the next one, where a row is a sum of several."""

ACTIVATIONS = (None, "gelu_tanh", "silu")
_INTERPRETED = constexpr(INTERPRETED)


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


_LOGISTIC_ASM = constexpr(
    "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }"
)


@triton.jit
def _logistic(x):
    """1 / (1 + 2^-x): what Triton makes of it takes three times the instructions, for denormals that round to 0 here."""
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(-x))
    return tl.inline_asm_elementwise(_LOGISTIC_ASM, "=f,f", [-x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x (float32) after the activation; gelu by its tanh form: 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))."""
    if ACTIVATION == "gelu_tanh":
        # 2 log2(e) sqrt(2 / pi), and that times 0.044715.
        x = x * _logistic(x * (2.302208198144325 + 0.1029432395800235 * x * x))
    elif ACTIVATION == "silu":
        x = x * _logistic(1.4426950408889634 * x)
    return x


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits: their order is that of the magnitudes, with Inf and then NaN above every number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(bits, limit, smallest):
    """(scale, 1 / scale) of rows whose largest magnitude has these bits; NaN and Inf stay."""
    scale = bits.to(tl.float32, bitcast=True) * (1.0 / limit)
    scale = tl.where(scale < smallest, smallest, scale)
    return scale, 1.0 / scale


@triton.jit
def to_codes(x, INTEGER: tl.constexpr):
    """Scaled float32 values to int8 (nearest, ties to even) or e4m3 (saturating)."""
    # 1.5 * 2^23 leaves the rounded value in the low byte of the sum.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8) if INTEGER else x.to(tl.float8e4nv)


@triton.jit
def row_of_sample(x_ptr, rows, stride_b, stride_m, IN_SAMPLES: tl.constexpr):
    """Where this program's row begins, among samples of `rows` each."""
    row = tl.program_id(0)
    if IN_SAMPLES:
        return x_ptr + (row // rows).to(tl.int64) * stride_b + (row % rows).to(tl.int64) * stride_m
    return x_ptr + row.to(tl.int64) * stride_m


def rows_and_strides(x: torch.Tensor) -> tuple[int, ...]:
    """(rows of a sample, its stride, a row's, an element's) of x (samples, rows, K), or (M, K), which has no samples."""
    return (x.shape[1], *x.stride()) if x.ndim == 3 else (0, 0, *x.stride())


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    weight_scale_ptr,
    rows,
    stride_b,
    stride_m,
    stride_k,
    limit,
    smallest,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FOLD_WEIGHT_SCALE: tl.constexpr,
    ONE_PASS: tl.constexpr,
    IN_SAMPLES: tl.constexpr,
):
    """One row a program; `rows` of each sample."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    x_row = row_of_sample(x_ptr, rows, stride_b, stride_m, IN_SAMPLES)
    target = q_ptr + row * K + column
    if ONE_PASS:
        x = tl.load(x_row + column.to(tl.int64) * stride_k, mask=column < K, other=0.0).to(tl.float32)
        x = activate(x, ACTIVATION)
        scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=0), limit, smallest)
        tl.store(target, to_codes(x * inverse, INTEGER), mask=column < K)
    else:
        bits = tl.zeros([BLOCK_K], dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            source = x_row + (start + column).to(tl.int64) * stride_k
            x = tl.load(source, mask=column < K - start, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, magnitude_bits(activate(x, ACTIVATION)))
        scale, inverse = scale_and_inverse(tl.max(bits, axis=0), limit, smallest)
        for start in range(0, K, BLOCK_K):
            source = x_row + (start + column).to(tl.int64) * stride_k
            x = tl.load(source, mask=column < K - start, other=0.0).to(tl.float32)
            tl.store(target + start, to_codes(activate(x, ACTIVATION) * inverse, INTEGER), mask=column < K - start)
    if FOLD_WEIGHT_SCALE:
        scale = scale * tl.load(weight_scale_ptr)
    tl.store(scale_ptr + row, scale)


ONE_PASS_COLUMNS = 16384
"""Longest row that the kernel keeps in registers between finding its scale and storing it."""


def row_warps(columns: int) -> int:
    """Warps of a program that keeps a row in registers: a thread has up to 64 of its columns."""
    return min(power_of_two(ceil_div(columns, 64 * 32)), 32)


def quantize_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    activation: str | None = None,
    weight_scale: torch.Tensor | None = None,
) -> None:
    """Quantize the rows of x, of any strides, to the row-major int8 or e4m3 `q` (M, K) and its `scale` (M,) float32.

    Args:
        x: (M, K), or (samples, rows, K), in float16, bfloat16 or float32.
        q: written; its dtype is the target's.
        scale: written; times `weight_scale` (one float32 element) where that is given.
        activation: applied to x first.
        weight_scale: tensor-wide weight scale to fold into the row scales.
    """
    (count, columns), folds = q.shape, weight_scale is not None
    one_pass = columns <= ONE_PASS_COLUMNS
    launch(
        _quantize_rows_kernel,
        (count, 1, 1),
        (x, q, scale, weight_scale if folds else scale, *rows_and_strides(x), LIMITS[q.dtype], SMALLEST_SCALE),
        {
            "K": columns,
            "BLOCK_K": power_of_two(columns) if one_pass else 4096,
            "INTEGER": q.dtype == torch.int8,
            "ACTIVATION": activation,
            "FOLD_WEIGHT_SCALE": folds,
            "ONE_PASS": one_pass,
            "IN_SAMPLES": x.ndim == 3,
        },
        warps=row_warps(columns) if one_pass else 8,
    )
