"""The 8-bit matmul of Hopper, in Gluon: one warp copies, two groups of four warps each multiply 64 rows with 256 columns.

Each group writes its part of a tile while the other multiplies and the copying warp is already at the next tile.
"""

from __future__ import annotations

import math

import torch

from .launch import in_blocks, launch
from .runtime import (
    GLUON_FOUND,
    HOPPER,
    ceil_div,
    compute_capability,
    constexpr,
    gl,
    gluon,
    hopper,
    multiprocessor_count,
)
from .scaled_tiles import apply_scales, column_values, row_values, tile_position

FEW_ROWS = 512
FULL = 0.9
SHORT = 40_000_000_000
"""Multiplications that take about 60 us, as long as a linear takes on the processor."""

GROUPS = 2
ROWS = 64
COLUMNS = 256
DEPTH = 128
STAGES = 4
PARTS = 4
"""In which a group writes its columns of a tile."""

REGISTERS = 232
ROW_TILES = 16
"""That share columns in the L2 cache, as measured on an H200."""

_GROUPS = constexpr(GROUPS)
_ROWS = constexpr(ROWS)
_COLUMNS = constexpr(COLUMNS)
_DEPTH = constexpr(DEPTH)
_STAGES = constexpr(STAGES)
_PARTS = constexpr(PARTS)
_REGISTERS = constexpr(REGISTERS)
_ROW_TILES = constexpr(ROW_TILES)


@gluon.jit
def _copy_tiles(a, b, a_tiles, b_tiles, full, empty, tiles_m, tiles_n, steps):
    """The warp that copies: for each tile its steps of A and B."""
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, _ROW_TILES)
        row = tile_m * (_GROUPS * _ROWS)
        for step in range(steps):
            stage = count % _STAGES
            here = full.index(stage)
            hopper.mbarrier.wait(empty.index(stage), (count // _STAGES) & 1 ^ 1)
            hopper.mbarrier.expect(here, (_GROUPS * _ROWS + _COLUMNS) * _DEPTH)
            for index in gl.static_range(_GROUPS):
                start = [row + index * _ROWS, step * _DEPTH]
                hopper.tma.async_copy_global_to_shared(a, start, here, a_tiles.index(stage * _GROUPS + index))
            hopper.tma.async_copy_global_to_shared(b, [tile_n * _COLUMNS, step * _DEPTH], here, b_tiles.index(stage))
            count += 1


@gluon.jit
def _halves(x):
    """The left and the right half of a matrix's columns, each in the registers where it was."""
    return gl.split(gl.permute(gl.reshape(x, [_ROWS, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _multiply_tiles(
    a_tiles, b_tiles, full, empty, c, c_tiles, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, tiles_m, tiles_n, steps,
    INDEX: gl.constexpr, INTEGER: gl.constexpr, SCALE_PER_COLUMN: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One group's rows of each tile."""
    TYPE: gl.constexpr = gl.int32 if INTEGER else gl.float32
    # Triton knows no integer instruction of 256 columns.
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if INTEGER else _COLUMNS, 32])
    WIDTH: gl.constexpr = _COLUMNS // _PARTS
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, _ROW_TILES)
        first_m = (tile_m * _GROUPS + INDEX) * _ROWS
        first_n = tile_n * _COLUMNS
        acc = gl.zeros([_ROWS, _COLUMNS], TYPE, layout=RESULT)
        for step in range(steps):
            stage = count % _STAGES
            hopper.mbarrier.wait(full.index(stage), (count // _STAGES) & 1)
            columns = b_tiles.index(stage).permute((1, 0))
            acc = hopper.warpgroup_mma(
                a_tiles.index(stage * _GROUPS + INDEX), columns, acc, use_acc=step > 0, is_async=True
            )
            # One step's products run while the next one's are asked for.
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
            hopper.mbarrier.arrive(empty.index((count + _STAGES - 1) % _STAGES), pred=step > 0)
            count += 1
        row = first_m + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, PART))
        column = first_n + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, PART))
        row_scale = row_values(row, M, row_scale_ptr, column_scale_ptr, SCALE_PER_COLUMN)
        scale, bias = column_values(column, N, column_scale_ptr, bias_ptr, SCALE_PER_COLUMN, HAS_BIAS)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        hopper.mbarrier.arrive(empty.index((count + _STAGES - 1) % _STAGES))
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
        for index in gl.static_range(_PARTS):
            part = gl.convert_layout(parts[index], PART, assert_trivial=True)
            out = apply_scales(part, row_scale, scale, bias).to(c.dtype)
            if index + 1 < _PARTS:
                column += WIDTH
                scale, bias = column_values(column, N, column_scale_ptr, bias_ptr, SCALE_PER_COLUMN, HAS_BIAS)
            target = c_tiles.index(index % 2)
            hopper.tma.store_wait(1)
            target.store(out)
            hopper.fence_async_shared()
            hopper.tma.async_copy_shared_to_global(c, [first_m, first_n + index * WIDTH], target)
    hopper.tma.store_wait(0)


@gluon.jit
def _matmul_hopper_kernel(
    a, b, c, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, K,
    INTEGER: gl.constexpr, SCALE_PER_COLUMN: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 x 256, as many programs as the GPU runs at once; the arguments are `matmul_rows`'."""
    a_tiles = gl.allocate_shared_memory(a.dtype, [_STAGES * _GROUPS, _ROWS, _DEPTH], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [_STAGES, _COLUMNS, _DEPTH], b.layout)
    c_first = gl.allocate_shared_memory(c.dtype, [2, _ROWS, _COLUMNS // _PARTS], c.layout)
    c_second = gl.allocate_shared_memory(c.dtype, [2, _ROWS, _COLUMNS // _PARTS], c.layout)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    for stage in gl.static_range(_STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=_GROUPS)
    hopper.fence_async_shared()
    tiles_m = gl.cdiv(M, _GROUPS * _ROWS)
    tiles_n = gl.cdiv(N, _COLUMNS)
    steps = gl.cdiv(K, _DEPTH)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                a_tiles, b_tiles, full, empty, c, c_first, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, tiles_m,
                tiles_n, steps, FIRST, INTEGER, SCALE_PER_COLUMN, HAS_BIAS,
            )),
            (_multiply_tiles, (
                a_tiles, b_tiles, full, empty, c, c_second, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, tiles_m,
                tiles_n, steps, SECOND, INTEGER, SCALE_PER_COLUMN, HAS_BIAS,
            )),
            (_copy_tiles, (a, b, a_tiles, b_tiles, full, empty, tiles_m, tiles_n, steps)),
        ],
        [4, 1],
        [_REGISTERS, 24],
    )  # fmt: skip


def _tile_count(rows: int, columns: int) -> int:
    return ceil_div(rows, GROUPS * ROWS) * ceil_div(columns, COLUMNS)


def matches_cublas(rows: int, columns: int, depth: int, index: int) -> bool:
    """Whether `matmul_rows` multiplies FP8 on CUDA device `index` (cc 9.0) as fast as cuBLAS, give or take a tenth.

    As measured on an H200: with few rows, and where tiles keep every multiprocessor at work till the end. It is launched
    in a third of the time, which counts as long as the GPU is done within that. Elsewhere cuBLAS takes up to a sixth less.
    """
    if rows <= FEW_ROWS:
        return True
    rounds = _tile_count(rows, columns) / multiprocessor_count(index)
    return rows * columns * depth <= SHORT and rounds >= FULL * math.ceil(rounds)


def takes_hopper(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `multiply_hopper` multiplies these, as far as they suit tensor descriptors."""
    return (
        GLUON_FOUND
        and a.dtype == b.dtype
        and out.element_size() == 2
        and compute_capability(a.device.index or 0) == HOPPER
    )


def multiply_hopper(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, vectors: tuple[torch.Tensor, ...], flags: dict[str, bool]
) -> None:
    """What `matmul_rows` does, for matrices that `takes_hopper`.

    vectors: the scales of a's rows and of b's, and the bias.
    flags: INTEGER, SCALE_PER_COLUMN and HAS_BIAS.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    tiles = _tile_count(rows, columns)
    launch(
        _matmul_hopper_kernel,
        (min(tiles, multiprocessor_count(a.device.index or 0)), 1, 1),
        (
            in_blocks(a, ROWS, DEPTH),
            in_blocks(b, COLUMNS, DEPTH),
            in_blocks(out, ROWS, COLUMNS // PARTS),
            *vectors,
            rows,
            columns,
            depth,
        ),
        flags,
    )
