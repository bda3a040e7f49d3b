"""8-bit x 8-bit matmul with a scale per row of x, a scale per row of W and the bias in its epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import Described, launch
from .matmul_hopper import multiply_hopper, takes_hopper
from .runtime import ceil_div, multiprocessor_count, tl, triton
from .scaled_tiles import apply_scales, column_values, row_values, tile_position


@triton.jit
def _matmul_rows_descriptor_kernel(
    a_desc,
    b_desc,
    c_desc,
    c_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_DESCRIPTOR: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Persistent kernel on tensor descriptors (TMA): each program walks over output tiles PROGRAMS apart."""
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACCUMULATOR)
        for step in range(steps):
            a = a_desc.load([first_m, step * BLOCK_K])
            b = b_desc.load([first_n, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, out_dtype=ACCUMULATOR)
        row = first_m + tl.arange(0, BLOCK_M)
        row_scale = row_values(row, M, row_scale_ptr, column_scale_ptr, SCALE_PER_COLUMN)
        column = first_n + tl.arange(0, BLOCK_N)
        scale, bias = column_values(column, N, column_scale_ptr, bias_ptr, SCALE_PER_COLUMN, HAS_BIAS)
        out = apply_scales(acc, row_scale, scale, bias).to(c_ptr.dtype.element_ty)
        if STORE_DESCRIPTOR:
            c_desc.store([first_m, first_n], out)
        else:
            target = c_ptr + row.to(tl.int64)[:, None] * stride_c + column[None, :]
            tl.store(target, out, mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def _matmul_rows_pointer_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    M,
    N,
    stride_c,
    K: tl.constexpr,
    STRIDE_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One output tile per program through plain pointers: any K, N, alignment and GPU."""
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    # Rows past the end read row 0: their results are never stored, and the loads need no row mask.
    a_row = a_ptr + tl.where(row < M, row, 0).to(tl.int64)[:, None] * K + lane[None, :]
    b_row = b_ptr + tl.where(column < N, column, 0).to(tl.int64)[None, :] * STRIDE_B + lane[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_row + start)
            b = tl.load(b_row + start)
        else:
            a = tl.load(a_row + start, mask=(lane < K - start)[None, :], other=0.0)
            b = tl.load(b_row + start, mask=(lane < K - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACCUMULATOR)
    row_scale = row_values(row, M, row_scale_ptr, column_scale_ptr, SCALE_PER_COLUMN)
    scale, bias = column_values(column, N, column_scale_ptr, bias_ptr, SCALE_PER_COLUMN, HAS_BIAS)
    out = apply_scales(acc, row_scale, scale, bias).to(c_ptr.dtype.element_ty)
    target = c_ptr + row.to(tl.int64)[:, None] * stride_c + column[None, :]
    tl.store(target, out, mask=(row < M)[:, None] & (column < N)[None, :])


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tile sizes and launch options of a descriptor kernel: rows, columns, depth, row tiles that share columns in L2."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    store_descriptor: bool = False
    flatten: bool = True
    waves: int = 1


WIDE = Tiles(128, 256, 128, 8, 8, 4)
NARROW = Tiles(64, 128, 128, 8, 4, 4, store_descriptor=True, flatten=False, waves=2)


WIDE_TIME = 1.65
"""What a round of wide tiles takes, one on each multiprocessor, in rounds of narrow ones, as measured on an H200."""


def choose_tiles(rows: int, columns: int, out_bytes: int, multiprocessors: int) -> Tiles:
    """Tiles for so many rows, columns and bytes of an output element: those that are done earlier.

    That depends on how often a multiprocessor has to begin again. The wide tiles of a float32 output do not fit into
    shared memory.
    """
    if out_bytes > 2:
        return NARROW
    wide, narrow = (_rounds(rows, columns, tiles, multiprocessors) for tiles in (WIDE, NARROW))
    return WIDE if WIDE_TIME * wide <= narrow else NARROW


def _rounds(rows: int, columns: int, tiles: Tiles, multiprocessors: int) -> int:
    count = ceil_div(rows, tiles.block_m) * ceil_div(columns, tiles.block_n)
    return ceil_div(count, multiprocessors * tiles.waves)


def matmul_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    descriptors: bool,
    tiles: Tiles | None = None,
) -> None:
    """(a @ b.T) x row_scale x column_scale + bias into `out`.

    Args:
        a: (M, K) int8 or float8, row-major.
        b: (N, K) of the same dtype, or of the other float8, last stride 1.
        row_scale: (M,) float32.
        column_scale: (N,) or (1,) float32.
        bias: (N,) of any float dtype, or None.
        out: (M, N) float16, bfloat16 or float32, last stride 1, written.
        descriptors: use tensor descriptors where alignment allows (cc 9.0 to 11.x: their tiles take up to 227 KiB).
        tiles: force these; None: `choose_tiles`, or the kernel of Hopper.
    """
    described = descriptors and all(map(_suits_descriptors, (a, b, out)))
    # Where a kernel reads no bias, it is given the output.
    vectors = row_scale, column_scale, out if bias is None else bias
    flags = {
        "INTEGER": a.dtype == torch.int8,
        "SCALE_PER_COLUMN": column_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
    }
    rows, columns = a.shape[0], b.shape[0]
    multiprocessors = multiprocessor_count(a.device.index or 0)
    if described and tiles is None:
        tiles = choose_tiles(rows, columns, out.element_size(), multiprocessors)
        if tiles is WIDE and takes_hopper(a, b, out):
            multiply_hopper(a, b, out, vectors, flags)
            return
    if not described:
        small = rows <= 64
        block_m, block_n = (64, 64) if small else (128, 128)
        launch(
            _matmul_rows_pointer_kernel,
            (ceil_div(rows, block_m) * ceil_div(columns, block_n), 1, 1),
            (a, b, out, *vectors, rows, columns, out.stride(0)),
            {
                "K": a.shape[1],
                "STRIDE_B": b.stride(0),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": 64,
                "GROUP_M": 8,
                **flags,
            },
            warps=4 if small else 8,
        )
        return
    programs = multiprocessors * tiles.waves
    count = ceil_div(rows, tiles.block_m) * ceil_div(columns, tiles.block_n)
    launch(
        _matmul_rows_descriptor_kernel,
        (min(programs, count), 1, 1),
        (
            Described(a, (tiles.block_m, tiles.block_k)),
            Described(b, (tiles.block_n, tiles.block_k)),
            Described(out, (tiles.block_m, tiles.block_n)),
            out,
            *vectors,
            rows,
            columns,
            a.shape[1],
            out.stride(0),
        ),
        {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "GROUP_M": tiles.group_m,
            "PROGRAMS": programs,
            **flags,
            "STORE_DESCRIPTOR": tiles.store_descriptor,
            "FLATTEN": tiles.flatten,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )


def _suits_descriptors(matrix: torch.Tensor) -> bool:
    return matrix.stride(1) == 1 and (matrix.stride(0) * matrix.element_size() | matrix.data_ptr()) % 16 == 0
