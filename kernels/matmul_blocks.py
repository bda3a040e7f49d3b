"""Weight-only matmul for few rows of x and nvfp4 weights, decoded in 64-bit words.

A word is one block of 16 columns. Tensor core operands hold pairs of neighbours
along K, so column j of two neighbouring words is decoded in one register and multiplied by the pair of their scales, and
every j has its own small dot: no number ever has to move to another thread after it is decoded. A program keeps its part
of x, and the parts along K are added up by a second kernel.
"""

from __future__ import annotations

import torch

from .decode_tiles import e2m1_to_float32, e4m3_to_float32, swizzled_offset
from .launch import launch
from .matmul_decode import sum_splits
from .quantize_rows import _activate
from .runtime import ceil_div, constexpr, power_of_two, tl, triton
from .stored_weight import StoredWeight


def _pair(byte: int) -> list[str]:
    """p = this byte of word a, twice, in the low lane and of word b, twice, in the high one."""
    index = byte % 4
    select = (4 + index) << 12 | (4 + index) << 8 | index << 4 | index
    half = byte // 4
    return [f"prmt.b32 p, a{half}, b{half}, {select:#06x};"]


def _assembly(columns: int, body: list[str]) -> str:
    head = [
        "{",
        ".reg .b32 a0, a1, b0, b1, p, t, one, zero;",
        f"mov.b64 {{a0, a1}}, ${columns};",
        f"mov.b64 {{b0, b1}}, ${columns + 1};",
        "mov.b32 zero, 0x80008000;",
    ]
    return "\n".join([*head, *body, "}"])


def _nvfp4_assembly(kind: str, high: int, low: int, mask: str) -> str:
    """Two words to 16 pairs. A nibble's sign goes to bit 15, its code to the lane's `mask`; the scale does the rest."""
    body = []
    for byte in range(8):
        body += _pair(byte)
        body += [
            f"shl.b32 t, p, {high};",
            f"and.b32 t, t, {mask};",
            "lop3.b32 t, p, 0x80008000, t, 0xEA;",
            f"fma.rn.{kind} ${2 * byte}, t, $18, zero;",
            f"shl.b32 t, p, {low};",
            f"and.b32 t, t, {mask};",
            "shl.b32 p, p, 4;",
            "lop3.b32 t, p, 0x80008000, t, 0xEA;",
            f"fma.rn.{kind} ${2 * byte + 1}, t, $18, zero;",
        ]
    return _assembly(16, body)


_NVFP4_BFLOAT16 = constexpr(_nvfp4_assembly("bf16x2", 2, 6, "0x01c001c0"))
_NVFP4_FLOAT16 = constexpr(_nvfp4_assembly("f16x2", 5, 9, "0x0e000e00"))
_NVFP4_CONSTRAINTS = constexpr(",".join(["=r"] * 16 + ["l", "l", "r"]))
_BFLOAT16_16 = constexpr((tl.bfloat16,) * 16)
_FLOAT16_16 = constexpr((tl.float16,) * 16)


@triton.jit
def _word_scale(stored, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Scales of the words as DTYPE; in assembly they carry all but a power of two of what the shifted codes lack."""
    scale = stored.to(tl.float32) if stored.dtype == tl.float8e4nv else e4m3_to_float32(stored)
    if ASSEMBLY and DTYPE == tl.bfloat16:  # noqa: SIM300
        scale = scale * 3.3230699894622897e35  # 2 ** 118
    elif ASSEMBLY:
        scale = scale * 128.0
    return scale.to(DTYPE)


@triton.jit
def _column_of_words(words, scale, j: tl.constexpr, DTYPE: tl.constexpr):
    """Column j of every word, decoded in plain operations."""
    code = (words >> (8 * (j // 2) + 4 * (1 - j % 2))).to(tl.int32) & 0xF
    return (e2m1_to_float32(code) * scale.to(tl.float32)).to(DTYPE)


@triton.jit
def _words_of_rows_kernel(
    x_ptr,
    out_ptr,
    stride_m,
    stride_k,
    M,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x (M, K) to (16, M, WIDTH): column j of every word side by side, zeros after the last."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + column * stride_k, mask=column < K, other=0.0)
    if ACTIVATION is not None:
        x = _activate(x.to(tl.float32), ACTIVATION)
    target = out_ptr + ((column % 16) * M + row) * WIDTH + column // 16
    tl.store(target, x.to(out_ptr.dtype.element_ty), mask=column < 16 * WIDTH)


@triton.jit
def _column(x, j: tl.constexpr, stride_column, word, K: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Column j of every word of x, (words, m); MASKED: some lie beyond K, and are zeros."""
    if MASKED:
        value = tl.load(x + j * stride_column, mask=(word * 16 + j < K)[:, None], other=0.0)
    else:
        value = tl.load(x + j * stride_column)
    if ACTIVATION is not None:
        value = _activate(value.to(tl.float32), ACTIVATION).to(value.dtype)
    return value


@triton.jit
def _columns(x, stride_column, word, K: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """All 16 of them."""
    return (
        _column(x, 0, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 1, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 2, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 3, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 4, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 5, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 6, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 7, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 8, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 9, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 10, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 11, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 12, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 13, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 14, stride_column, word, K, MASKED, ACTIVATION),
        _column(x, 15, stride_column, word, K, MASKED, ACTIVATION),
    )


@triton.jit
def _matmul_blocks_kernel(
    x_ptr,
    w_ptr,
    block_scale_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_word,
    stride_column,
    stride_wn,
    tiles_per_row,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
    WAITS: tl.constexpr,
):
    """Partial products (K / (16 x WORDS), M, N) in float32, without scale and bias; stride_wn counts words.

    A program holds its part of x and goes over TILES x BLOCK_N rows of the weight. x is (M, K / 16, 16) by any strides;
    MASKED: its last part goes beyond K; WAITS: it is made by a kernel that may still run.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TOTAL: tl.constexpr = (K + 15) // 16
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if WAITS:
        tl.extra.cuda.gdc_wait()
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = x_ptr + tl.where(m < M, m, 0).to(tl.int64)[None, :] * stride_xm + word[:, None] * stride_word
    x = _columns(first, stride_column, word, K, MASKED, ACTIVATION)
    out_row = out_ptr + (tl.program_id(1) * M + m).to(tl.int64)[None, :] * N
    for tile in range(TILES):
        n = (tl.program_id(0) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_n = tl.where(n < N, n, 0)
        w_tile = w_ptr + safe_n.to(tl.int64)[:, None] * stride_wn + word[None, :]
        s_tile = block_scale_ptr + swizzled_offset(safe_n[:, None], word[None, :], tiles_per_row)
        if TOTAL % WORDS == 0:
            words = tl.load(w_tile)
            stored = tl.load(s_tile)
        else:
            words = tl.load(w_tile, mask=(word < TOTAL)[None, :], other=0)
            stored = tl.load(s_tile, mask=(word < TOTAL)[None, :], other=0.0)
        scale = _word_scale(stored, DTYPE, ASSEMBLY)
        if ASSEMBLY:
            if DTYPE == tl.bfloat16:  # noqa: SIM300
                pieces = tl.inline_asm_elementwise(
                    _NVFP4_BFLOAT16, _NVFP4_CONSTRAINTS, [words, scale], _BFLOAT16_16, is_pure=True, pack=2
                )
            else:
                pieces = tl.inline_asm_elementwise(
                    _NVFP4_FLOAT16, _NVFP4_CONSTRAINTS, [words, scale], _FLOAT16_16, is_pure=True, pack=2
                )
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for j in tl.static_range(16):
            w = pieces[j] if ASSEMBLY else _column_of_words(words, scale, j, DTYPE)
            acc = tl.dot(w, x[j], acc)
        if ASSEMBLY:
            acc = acc * (256.0 if DTYPE == tl.bfloat16 else 128.0)  # noqa: SIM300
        tl.store(out_row + n[:, None], acc, mask=(m < M)[None, :] & (n < N)[:, None])


WORDS_PER_PART = 32
ROWS_AS_THEY_ARE = 8
"""Of x, up to which every program picks its columns out of it; more are put side by side by a kernel of their own."""


def block_splits(columns: int) -> int:
    """Parts of K that are multiplied side by side."""
    return ceil_div(columns, 16 * WORDS_PER_PART)


def words_shape(rows: int, columns: int) -> tuple[int, int, int] | None:
    """Of the work space in which x's columns are put side by side; None where they are taken as they are."""
    if rows <= ROWS_AS_THEY_ARE:
        return None
    return 16, rows, block_splits(columns) * WORDS_PER_PART


def _words_of_rows(x: torch.Tensor, words: torch.Tensor, activation: str | None, overlap: bool) -> None:
    rows, columns = x.shape
    width = words.shape[2]
    launch(
        _words_of_rows_kernel,
        (rows, ceil_div(16 * width, 1024), 1),
        (x, words, x.stride(0), x.stride(1), rows),
        {"K": columns, "WIDTH": width, "BLOCK": 1024, "ACTIVATION": activation, "OVERLAP": overlap},
    )


def matmul_blocks(
    x: torch.Tensor,
    words: torch.Tensor | None,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor,
    *,
    assembly: bool,
    hardware_e4m3: bool,
    tiles: int = 1,
    activation: str | None = None,
    overlap: bool = False,
) -> None:
    """Weight-only product of x (M, K) and an nvfp4 weight into `out` (M, N).

    Args:
        x: float16 or bfloat16, any strides.
        words: `words_shape(M, K)` work space of x's dtype.
        weight: kind nvfp4; codes 8-byte aligned, row pitch a multiple of 8.
        bias: (N,) or None.
        out: (M, N), last stride 1, written.
        partial: (block_splits(K), M, N) float32 work space.
        assembly: compiled for a GPU (the interpreter has no inline assembly).
        hardware_e4m3: the GPU converts e4m3 (cc 8.9 and later).
        tiles: of 64 rows of the weight that a program goes over with its part of x.
        activation: applied to x first.
        overlap: let each kernel start while the one before still runs (cc 9.0).
    """
    rows, columns = x.shape
    strides = x.stride(0), 16 * x.stride(1), x.stride(1)
    masked = words is None and columns % (16 * WORDS_PER_PART) != 0
    if words is not None:
        _words_of_rows(x, words, activation, overlap)
        x, activation, strides = words, None, (words.stride(1), 1, words.stride(0))
    waits = overlap and words is not None
    block_m = min(max(8, power_of_two(rows)), 32)
    launch(
        _matmul_blocks_kernel,
        (ceil_div(weight.rows, 64 * tiles), block_splits(columns), ceil_div(rows, block_m)),
        (
            x,
            weight.data.view(torch.int64),
            weight.block_scale.view(torch.float8_e4m3fn) if hardware_e4m3 else weight.block_scale,
            partial,
            rows,
            weight.rows,
            *strides,
            weight.data.stride(0) // 8,
            weight.scale_tiles_per_row,
        ),
        {
            "K": columns,
            "MASKED": masked,
            "ACTIVATION": activation,
            "ASSEMBLY": assembly,
            "BLOCK_M": block_m,
            "BLOCK_N": 64,
            "WORDS": WORDS_PER_PART,
            "TILES": tiles,
            "OVERLAP": overlap,
            "WAITS": waits,
        },
        stages=2,
        overlap=waits,
    )
    sum_splits(partial, weight, bias, out, overlap)
