"""Weight-only matmul for few rows of x and nvfp4 weights, decoded in 64-bit words.

A word is one block of 16 columns. Tensor core operands hold pairs of neighbours
along K, so column j of two neighbouring words is decoded in one register and multiplied by the pair of their scales, and
every j has its own small dot: no number ever has to move to another thread after it is decoded.
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
    scale = e4m3_to_float32(stored)
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
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x (M, K) to (COLUMNS, M, WIDTH): column j of every word side by side, zeros after the last."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + column * stride_k, mask=column < K, other=0.0)
    if ACTIVATION is not None:
        x = _activate(x.to(tl.float32), ACTIVATION)
    target = out_ptr + ((column % COLUMNS) * M + row) * WIDTH + column // COLUMNS
    tl.store(target, x.to(out_ptr.dtype.element_ty), mask=column < COLUMNS * WIDTH)


@triton.jit
def _matmul_blocks_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    block_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_wn,
    stride_out,
    tiles_per_row,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    FINAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Out (M, N); FINAL False: (SPLITS, M, N) float32 partial products without scale and bias.

    x comes as (16, M, WIDTH) from `_words_of_rows_kernel`; stride_wn counts words.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TOTAL: tl.constexpr = (K + 15) // 16
    LENGTH: tl.constexpr = ((TOTAL + WORDS * SPLITS - 1) // (WORDS * SPLITS)) * WORDS
    EVEN: tl.constexpr = TOTAL % (WORDS * SPLITS) == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_n = tl.where(n < N, n, 0)
    word = tl.program_id(1) * LENGTH + tl.arange(0, WORDS)
    w_tile = w_ptr + safe_n.to(tl.int64)[:, None] * stride_wn + word[None, :]
    s_tile = block_scale_ptr + swizzled_offset(safe_n[:, None], word[None, :], tiles_per_row)
    x_tile = x_ptr + tl.where(m < M, m, 0).to(tl.int64)[None, :] * WIDTH + word[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for step in range(0, LENGTH, WORDS):
        if EVEN:
            words = tl.load(w_tile + step)
            stored = tl.load(s_tile + step // 4 * 512)
        else:
            words = tl.load(w_tile + step, mask=(word < TOTAL - step)[None, :], other=0)
            stored = tl.load(s_tile + step // 4 * 512, mask=(word < TOTAL - step)[None, :], other=0)
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
        for j in tl.static_range(16):
            if EVEN:
                x = tl.load(x_tile + step + j * M * WIDTH)
            else:
                x = tl.load(x_tile + step + j * M * WIDTH, mask=(word < TOTAL - step)[:, None], other=0.0)
            w = pieces[j] if ASSEMBLY else _column_of_words(words, scale, j, DTYPE)
            acc = tl.dot(w, x, acc)
    if ASSEMBLY:
        acc = acc * (256.0 if DTYPE == tl.bfloat16 else 128.0)  # noqa: SIM300
    if FINAL:
        acc = acc * tl.load(scale_ptr)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    target = out_ptr + (tl.program_id(1) * M + m).to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def words_width(columns: int) -> int:
    """Words of 16 columns that a row of x takes, rounded up to whole steps of the kernel."""
    return -(-columns // (16 * WORDS_PER_STEP)) * WORDS_PER_STEP


WORDS_PER_STEP = 32


def matmul_blocks(
    x: torch.Tensor,
    words: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    *,
    splits: int,
    assembly: bool,
    activation: str | None = None,
    overlap: bool = False,
) -> None:
    """Weight-only product of x (M, K) and an nvfp4 weight into `out` (M, N).

    Args:
        x: float16 or bfloat16, any strides.
        words: (16, M, words_width(K)) work space of x's dtype, written.
        weight: kind nvfp4; codes 8-byte aligned, row pitch a multiple of 8.
        bias: (N,) or None.
        out: (M, N), last stride 1, written.
        partial: (splits, M, N) float32 work space, needed for splits > 1.
        splits: parts of K that are multiplied side by side.
        assembly: compiled for a GPU (the interpreter has no inline assembly).
        activation: applied to x first.
        overlap: let the second kernel start while the first still runs (cc 9.0).
    """
    rows, columns = x.shape
    width = words.shape[2]
    launch(
        _words_of_rows_kernel,
        (rows, ceil_div(16 * width, 1024), 1),
        (x, words, x.stride(0), x.stride(1), rows),
        {
            "K": columns,
            "COLUMNS": 16,
            "WIDTH": width,
            "BLOCK": 1024,
            "ACTIVATION": activation,
            "OVERLAP": overlap,
        },
    )
    single = splits == 1
    target = out if single else partial
    block_m = min(max(8, power_of_two(rows)), 32)
    launch(
        _matmul_blocks_kernel,
        (ceil_div(weight.rows, 64), splits, ceil_div(rows, block_m)),
        (
            words,
            weight.data.view(torch.int64),
            weight.scale,
            weight.block_scale,
            weight.scale if bias is None else bias,
            target,
            rows,
            weight.rows,
            weight.data.stride(0) // 8,
            target.stride(-2),
            weight.scale_tiles_per_row,
        ),
        {
            "K": columns,
            "WIDTH": width,
            "FINAL": single,
            "HAS_BIAS": bias is not None,
            "ASSEMBLY": assembly,
            "BLOCK_M": block_m,
            "BLOCK_N": 64,
            "WORDS": WORDS_PER_STEP,
            "SPLITS": splits,
            "OVERLAP": overlap,
        },
        stages=3,
        overlap=overlap,
    )
    if not single:
        sum_splits(partial, weight, bias, out)
