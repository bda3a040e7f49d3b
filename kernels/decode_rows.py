"""Decodes a stored weight once into a buffer: 16- or 32-bit values, an int8 grid, or e4m3 with a scale per row."""

from __future__ import annotations

import functools

import torch

from .decode_tiles import (
    code_to_float32,
    e2m1_pairs,
    e4m3_to_float32,
    e8m0_to_float32,
    int4_pairs,
    swizzled_offset,
    to_grid,
)
from .hadamard import hadamard
from .launch import launch
from .runtime import INTERPRETED, ceil_div, made_to_keep, power_of_two, tl, triton
from .stored_weight import StoredWeight

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
        value = to_grid(value)
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
def _butterfly(a, b, c, d):
    """(a, b, c, d) times the 4 x 4 regular Hadamard kernel over 2."""
    half = 0.5 * (a + b + c + d)
    return half - d, half - c, half - b, half - a


@functools.lru_cache(maxsize=32)
def unrotation_matrix(group: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The 64 x 64 matrix that undoes rotations of up to 64 columns; 256 takes one more step of `_butterfly`."""
    matrix = hadamard(min(group, 64), torch.device("cpu"), torch.float64)
    whole = torch.kron(torch.eye(64 // matrix.shape[0], dtype=torch.float64), matrix)
    return made_to_keep(lambda: whole.to(device=device, dtype=dtype).contiguous())


def unrotation_of(rotation: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What `decode_rows` takes besides to make values of this dtype: nothing for rotation 0."""
    if not rotation:
        return ()
    kept = torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    return (unrotation_matrix(rotation, device, kept),)


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
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows x 256 columns of an integer kind, brought back from the rotated basis. WHOLE: groups of 256."""
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
    if WHOLE:
        a, b, c, d = _butterfly(a, b, c, d)
    target = out_ptr + n.to(tl.int64)[:, None] * K + start + lane[None, :]
    inside = inside_n[:, None] & (start + lane < K)[None, :]
    element: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(target, (tl.dot(a.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    inside = inside_n[:, None] & (start + 64 + lane < K)[None, :]
    tl.store(target + 64, (tl.dot(b.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    inside = inside_n[:, None] & (start + 128 + lane < K)[None, :]
    tl.store(target + 128, (tl.dot(c.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)
    inside = inside_n[:, None] & (start + 192 + lane < K)[None, :]
    tl.store(target + 192, (tl.dot(d.to(h.dtype), h) * scale[:, None]).to(element), mask=inside)


def _kernel_codes(weight: StoredWeight, hardware_e4m3: bool) -> torch.Tensor:
    """The codes in the dtype the kernels take them in: bytes, unless the GPU converts e4m3 itself."""
    name = weight.code_name
    if name == "int8" or (name in ("e4m3", "mxfp8") and hardware_e4m3):
        return weight.data
    return weight.data.view(torch.uint8)


def decode_rows(
    weight: StoredWeight,
    out: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    *,
    hardware_e4m3: bool = True,
) -> None:
    """Decode the whole weight into the row-major `out` (rows, columns).

    Args:
        weight: stored weight without `correction`; codes row by row (last stride 1).
        out: float16, bfloat16 or float32: the values W. int8: an integer kind's grid, without its scale. float8_e4m3fn
            (mxfp8, nvfp4): W over the new scale per row.
        row_scale: (rows,) float32, written for float8_e4m3fn only.
        hardware_e4m3: the GPU converts e4m3 (cc 8.9 and later).
    """
    output = {torch.int8: GRID, torch.float8_e4m3fn: FLOAT8}.get(out.dtype, VALUES)
    codes = _kernel_codes(weight, hardware_e4m3)
    scale = codes if weight.scale is None else weight.scale
    block_scale = codes if weight.block_scale is None else weight.block_scale
    if block_scale.dtype == torch.float8_e4m3fn:
        block_scale = block_scale.view(torch.uint8)
    stored = codes, scale, block_scale, scale if weight.codebook is None else weight.codebook
    constants = {
        "K": weight.columns,
        "KIND": weight.code_name,
        "GROUP": weight.group,
        "SCALE": weight.scale_mode,
        "HAS_CODEBOOK": weight.codebook is not None,
    }
    if output == VALUES and weight.rotation:
        launch(
            _decode_rotated_kernel,
            (ceil_div(weight.rows, 64), ceil_div(weight.columns, 256), 1),
            (
                *stored,
                *unrotation_of(weight.rotation, out.device, out.dtype),
                out,
                weight.rows,
                codes.stride(0),
            ),
            {**constants, "WHOLE": weight.rotation == 256, "BLOCK_N": 64},
        )
        return
    rows_together, width = (4, 1024) if output == FLOAT8 else (1, 2048)
    launch(
        _decode_rows_kernel,
        (ceil_div(weight.rows, rows_together), 1, 1),
        (
            *stored,
            out,
            scale if row_scale is None else row_scale,
            weight.rows,
            codes.stride(0),
            weight.scale_tiles_per_row,
        ),
        {
            **constants,
            "OUTPUT": output,
            "HARDWARE_E4M3": hardware_e4m3,
            "BLOCK_N": rows_together,
            "BLOCK_K": width,
            "BLOCKS": power_of_two(ceil_div(weight.columns, max(weight.group, 1))),
        },
    )
