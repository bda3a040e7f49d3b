"""What the 8-bit matmuls share: the order of their tiles, and the scales and the bias in a tile's epilogue."""

from __future__ import annotations

from .runtime import tl, triton


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of `tile`, in columns of GROUP_M row tiles, so that neighbours share operands in L2."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + (tile % per_group) % height, (tile % per_group) // height


@triton.jit
def apply_scales(acc, row_scale, column_scale, bias):
    """acc (rows, columns) times both scales, plus the bias of each column."""
    return acc.to(tl.float32) * row_scale[:, None] * column_scale[None, :] + bias[None, :]


@triton.jit
def row_values(row, M, row_scale_ptr, scale_ptr, SCALE_PER_COLUMN: tl.constexpr):
    """The scales of rows, times the one of all columns where there is but one."""
    scale = tl.load(row_scale_ptr + row, mask=row < M, other=0.0)
    if not SCALE_PER_COLUMN:
        scale *= tl.load(scale_ptr)
    return scale


@triton.jit
def column_values(column, N, scale_ptr, bias_ptr, SCALE_PER_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(scale, bias) of columns: ones and zeros where there are none."""
    inside = column < N
    zero = (column * 0).to(tl.float32)
    scale = zero + 1.0
    if SCALE_PER_COLUMN:
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    bias = zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return scale, bias
