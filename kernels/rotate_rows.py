"""Rows rotated by the regular Hadamard matrix of convrot and, in the same pass, quantized to int8 or split into int8 terms."""

from __future__ import annotations

import math

import torch

from .launch import launch
from .quantize_rows import (
    INTEGER_TERM,
    LIMITS,
    SMALLEST_SCALE,
    activate,
    magnitude_bits,
    row_of_sample,
    row_warps,
    rows_and_strides,
    scale_and_inverse,
    to_codes,
)
from .runtime import INTERPRETED, constexpr, tl, triton

_INTEGER_TERM = constexpr(INTEGER_TERM)

KERNEL_ROTATIONS = (16, 64, 256)
"""Group sizes the kernels take; models use 256, or 64 for narrow layers."""


@triton.jit
def _factor(dtype, WHOLE: tl.constexpr):
    """(16, 16): the Hadamard matrix of 4 over an index's bits 3 and 0, times that (WHOLE) or the identity over 2 and 1.

    That matrix is -1/2 where both bits of row and column differ, else 1/2: the order of its two bits is all the same.
    """
    index = tl.arange(0, 16)
    apart = index[:, None] ^ index[None, :]
    outside = (apart & 9) == 9
    if WHOLE:
        return tl.where(outside != ((apart & 6) == 6), -0.25, 0.25).to(dtype)
    return tl.where((apart & 6) == 0, tl.where(outside, -0.5, 0.5), 0.0).to(dtype)


@triton.jit
def _columns(first, GROUPS: tl.constexpr):
    """(GROUPS x 32, 8) columns from `first`: the rows count bits 4, 5, 3, 6, 7 of the column, then the group."""
    row = tl.arange(0, GROUPS * 32)
    return (first + (row & 3) * 16 + ((row >> 2) & 1) * 8 + (row >> 3) * 64)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def _rotated(x, inner, outer, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr):
    """x as `_columns` orders it, rotated: (bits 2, 6, 7, 3; bit 1, group, bits 4, 5, 0).

    `inner` rotates the base-4 digits of bits 0, 1 and 4, 5, `outer` the others. So every operand lies in the threads and
    registers where the load or the product before has put it.
    """
    x = tl.reshape(activate(x.to(tl.float32), ACTIVATION).to(inner.dtype), [GROUPS, 4, 2, 4, 2, 2, 2])
    y = tl.dot(inner, tl.reshape(tl.permute(x, (5, 3, 6, 4, 0, 1, 2)), [16, GROUPS * 16])).to(inner.dtype)
    y = tl.reshape(y, [2, 4, 2, 2, GROUPS, 4, 2])
    return tl.dot(outer, tl.reshape(tl.permute(y, (3, 5, 6, 0, 4, 1, 2)), [16, GROUPS * 16]))


@triton.jit
def _store_rotated(q_row, z, first, K: tl.constexpr, GROUPS: tl.constexpr, PLANES: tl.constexpr):
    column = _columns(first, GROUPS)
    z = tl.permute(tl.reshape(z, [2, 4, 2, 2, GROUPS, 4, 2]), (4, 1, 2, 5, 0, 3, 6))
    target = q_row + column
    if PLANES > 1:
        target = q_row + (column % PLANES) * (K // PLANES) + column // PLANES
    tl.store(target, tl.reshape(z, [GROUPS * 32, 8]), mask=column < K)


@triton.jit
def _rotate_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    stride_b,
    stride_m,
    stride_k,
    limit,
    smallest,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    ROTATION: tl.constexpr,
    DOTS_IN_BFLOAT16: tl.constexpr,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
    IN_SAMPLES: tl.constexpr,
):
    """One row a program, in pieces of GROUPS x 256 columns; TERMS 0: the rotated row in q's own dtype.

    More than one: as `split_rows` splits what is rotated into x's own dtype. A rotation of 256 is two dots with 16 x 16
    matrices, each of which rotates two of a column's four base-4 digits.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    PIECES: tl.constexpr = (K + GROUPS * 256 - 1) // (GROUPS * 256)
    row = tl.program_id(0).to(tl.int64)
    x_row = row_of_sample(x_ptr, rows, stride_b, stride_m, IN_SAMPLES)
    q_row = q_ptr + row * K
    loaded = ()
    for piece in tl.static_range(PIECES):
        column = _columns(piece * GROUPS * 256, GROUPS)
        x = tl.load(x_row + column.to(tl.int64) * stride_k, mask=column < K, other=0.0)
        loaded = loaded + (x,)  # type: ignore[assignment]
    dtype: tl.constexpr = tl.bfloat16 if DOTS_IN_BFLOAT16 else tl.float32
    inner = _factor(dtype, ROTATION >= 64)
    outer = _factor(dtype, ROTATION >= 256)
    rotated = ()
    for piece in tl.static_range(PIECES):
        z = _rotated(loaded[piece], inner, outer, GROUPS, ACTIVATION)
        if TERMS > 1 and x_ptr.dtype.element_ty == tl.bfloat16:
            z = z.to(tl.bfloat16).to(tl.float32)
        rotated = rotated + (z,)  # type: ignore[assignment]
    if TERMS > 0:
        bits = tl.zeros([16, GROUPS * 16], dtype=tl.int32)
        for piece in tl.static_range(PIECES):
            bits = tl.maximum(bits, magnitude_bits(rotated[piece]))
        scale, inverse = scale_and_inverse(tl.max(bits), 127.0 if TERMS > 1 else limit, smallest)
        tl.store(scale_ptr + row, scale)
    for piece in tl.static_range(PIECES):
        first = piece * GROUPS * 256
        if TERMS == 0:
            _store_rotated(q_row, rotated[piece].to(q_ptr.dtype.element_ty), first, K, GROUPS, PLANES)
        else:
            rest = rotated[piece] * inverse
            for term in tl.static_range(TERMS):
                stored = to_codes(rest, True)
                _store_rotated(q_row + term * tl.num_programs(0) * K, stored, first, K, GROUPS, PLANES)
                rest = (rest - stored.to(tl.float32)) * _INTEGER_TERM


def rotate_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    rotation: int,
    activation: str | None = None,
    planes: int = 1,
    overlap: bool = False,
) -> None:
    """Rotate the rows of x, of any strides, into the row-major `out`: int8 with `scale` (M,) written, or a float dtype.

    Into (terms, M, K) int8 as `split_rows` would split what is rotated, with `planes` and `overlap` as there.

    Args:
        x: (M, K), or (samples, rows, K), in float16, bfloat16 or float32; K a multiple of `rotation`.
        out: (M, K) or (terms, M, K) int8, or (M, K) float16, bfloat16, float32 (then scale is None).
        scale: float32, written.
        rotation: group size, one of `KERNEL_ROTATIONS`.
        activation: applied to x first.
    """
    # float16's range is too short for sums of 16, so only bfloat16 takes the 16-bit dots; tf32 serves the others.
    halves = x.dtype == torch.bfloat16 and not INTERPRETED
    count, columns = out.shape[-2:]
    warps = row_warps(columns)
    launch(
        _rotate_rows_kernel,
        (count, 1, 1),
        (x, out, out if scale is None else scale, *rows_and_strides(x), LIMITS[torch.int8], SMALLEST_SCALE),
        {
            "K": columns,
            "GROUPS": warps,
            "ROTATION": rotation,
            "DOTS_IN_BFLOAT16": halves,
            "TERMS": 0 if scale is None else math.prod(out.shape[:-2]),
            "PLANES": planes,
            "ACTIVATION": activation,
            "OVERLAP": overlap,
            "IN_SAMPLES": x.ndim == 3,
        },
        warps=warps,
    )
