"""Decodes a stored weight once into a buffer: 16- or 32-bit values, an int8 grid, or e4m3 with a scale per row."""

from __future__ import annotations

from .decode_tiles import (
    code_to_float32,
    e2m1_pairs,
    e4m3_to_float32,
    e8m0_to_float32,
    int4_pairs,
    swizzled_offset,
)
from .rotate_rows import _butterfly
from .runtime import tl, triton

VALUES = "values"
GRID = "grid"
FLOAT8 = "float8"


@triton.jit
def _codebook_pairs(packed, codebook_ptr, HAS_CODEBOOK: tl.constexpr):
    low = packed.to(tl.int32) & 0xF
    high = (packed.to(tl.int32) >> 4) & 0xF
    if HAS_CODEBOOK:
        even = tl.load(codebook_ptr + low)
        odd = tl.load(codebook_ptr + high)
    else:
        even = low.to(tl.float32) - 8.0
        odd = high.to(tl.float32) - 8.0
    return even, odd


@triton.jit
def _round(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _tile_values(
    w_ptr,
    block_scale_ptr,
    codebook_ptr,
    n,
    start,
    stride_wn,
    tiles_per_row,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes x block scales of rows `n` and WIDTH columns from `start` as float32, without the scale of the row."""
    HEIGHT: tl.constexpr = n.shape[0]
    if KIND == "e2m1" or KIND == "int4" or KIND == "int4_codebook":
        byte = start // 2 + tl.arange(0, WIDTH // 2)
        code = tl.load(w_ptr + n.to(tl.int64)[:, None] * stride_wn + byte[None, :], mask=(byte < (K + 1) // 2)[None, :])
        if KIND == "e2m1":
            even, odd = e2m1_pairs(code, tl.float32, False)
        elif KIND == "int4":
            even, odd = int4_pairs(code, tl.float32)
        else:
            even, odd = _codebook_pairs(code, codebook_ptr, HAS_CODEBOOK)
        value = tl.reshape(tl.join(even, odd), [HEIGHT, WIDTH])
    else:
        column = start + tl.arange(0, WIDTH)
        source = w_ptr + n.to(tl.int64)[:, None] * stride_wn + column[None, :]
        value = code_to_float32(tl.load(source, mask=(column < K)[None, :], other=0.0), KIND, HARDWARE_E4M3)
    if GROUP > 0:
        block = start // GROUP + tl.arange(0, WIDTH // GROUP)
        inside = (block < (K + GROUP - 1) // GROUP)[None, :]
        if KIND == "int4_codebook":
            offset = n.to(tl.int64)[:, None] * (K // GROUP) + block[None, :]
            scale = tl.load(block_scale_ptr + offset, mask=inside, other=0)
            if block_scale_ptr.dtype.element_ty == tl.uint8:
                scale = e4m3_to_float32(scale)
            scale = scale.to(tl.float32)
        else:
            stored = tl.load(block_scale_ptr + swizzled_offset(n[:, None], block[None, :], tiles_per_row), mask=inside)
            scale = e8m0_to_float32(stored) if KIND == "mxfp8" else e4m3_to_float32(stored)
        value = tl.reshape(value, [HEIGHT, WIDTH // GROUP, GROUP]) * scale[:, :, None]
        value = tl.reshape(value, [HEIGHT, WIDTH])
    if KIND == "int4_codebook":
        value = _round(tl.minimum(tl.maximum(value, -127.0), 127.0))
    return value


@triton.jit
def _decode_rows_kernel(
    w_ptr,
    scale_ptr,
    block_scale_ptr,
    codebook_ptr,
    out_ptr,
    row_scale_ptr,
    N,
    stride_wn,
    tiles_per_row,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OUTPUT: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCK_N rows a program. SCALE: 0 none, 1 one for all, 2 one per row. BLOCKS: power of two >= scales of a row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    n = tl.where(inside_n, n, 0)
    scale = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
    if SCALE == 1:
        scale = scale * tl.load(scale_ptr)
    elif SCALE == 2:
        scale = tl.load(scale_ptr + n)
    if OUTPUT == "float8":
        block = tl.arange(0, BLOCKS)
        offset = swizzled_offset(n[:, None], block[None, :], tiles_per_row)
        stored = tl.load(block_scale_ptr + offset, mask=(block < (K + GROUP - 1) // GROUP)[None, :], other=0)
        largest = tl.max(stored.to(tl.int32), axis=1)
        # A power of two takes the largest block scale to 1 (mxfp8) or into 32..64 (nvfp4: times 6 stays below 448), so
        # that mxfp8 codes keep their bits unless they are 2^-15 of the row's largest.
        if KIND == "mxfp8":
            exponent = largest - 127
        else:
            bits = e4m3_to_float32(largest.to(tl.uint8)).to(tl.int32, bitcast=True)
            exponent = tl.maximum((bits >> 23) - 127, -9) - 5
        exponent = tl.minimum(tl.maximum(exponent, -126), 126)
        shrink = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        grow = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(row_scale_ptr + n, grow * scale, mask=inside_n)
        scale = shrink
    for start in range(tl.program_id(1) * BLOCK_K, K, BLOCK_K * tl.num_programs(1)):
        value = _tile_values(
            w_ptr, block_scale_ptr, codebook_ptr, n, start, stride_wn, tiles_per_row,
            K, KIND, GROUP, HAS_CODEBOOK, HARDWARE_E4M3, BLOCK_K,
        )  # fmt: skip
        if OUTPUT != "grid":
            value = value * scale[:, None]
        column = start + tl.arange(0, BLOCK_K)
        target = out_ptr + n.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside_n[:, None] & (column < K)[None, :])


@triton.jit
def _decode_rotated_kernel(
    w_ptr,
    scale_ptr,
    block_scale_ptr,
    codebook_ptr,
    hadamard_ptr,
    out_ptr,
    N,
    stride_wn,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows x 256 columns of an integer kind, brought back from the rotated basis."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    n = tl.where(inside_n, n, 0)
    start = tl.program_id(1) * 256
    scale = tl.load(scale_ptr + n) if SCALE == 2 else tl.load(scale_ptr + n * 0)
    lane = tl.arange(0, 64)
    h = tl.load(hadamard_ptr + lane[:, None] * 64 + lane[None, :])
    a = _tile_values(
        w_ptr, block_scale_ptr, codebook_ptr, n, start, stride_wn, 0, K, KIND, GROUP, HAS_CODEBOOK, True, 64
    )
    b = _tile_values(
        w_ptr, block_scale_ptr, codebook_ptr, n, start + 64, stride_wn, 0, K, KIND, GROUP, HAS_CODEBOOK, True, 64
    )
    c = _tile_values(
        w_ptr, block_scale_ptr, codebook_ptr, n, start + 128, stride_wn, 0, K, KIND, GROUP, HAS_CODEBOOK, True, 64
    )
    d = _tile_values(
        w_ptr, block_scale_ptr, codebook_ptr, n, start + 192, stride_wn, 0, K, KIND, GROUP, HAS_CODEBOOK, True, 64
    )
    a, b, c, d = _butterfly(a, b, c, d)
    target = out_ptr + n.to(tl.int64)[:, None] * K + start + lane[None, :]
    inside = inside_n[:, None]
    element: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(target, (tl.dot(a.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    tl.store(target + 64, (tl.dot(b.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    tl.store(target + 128, (tl.dot(c.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    tl.store(target + 192, (tl.dot(d.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
