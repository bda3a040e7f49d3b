"""Weight-only matmul for few rows of x on 8-bit tensor cores: x is split into 8-bit terms, the weight stays as stored.

A bfloat16 number is the sum of two e4m3 numbers (4 + 4 bits of its 8), a float16 number of three; in integers two terms
make a 15-bit grid. So the stored bytes go straight from memory into the tensor cores, with no decoding at all, and the
product is as exact as with 16-bit operands.
"""

from __future__ import annotations

import torch

from .launch import launch
from .matmul_decode import sum_splits
from .quantize_rows import INTEGER_TERM, SMALLEST_SCALE, activate, magnitude_bits
from .runtime import SMALLEST_DOT, ceil_div, constexpr, power_of_two, tl, triton
from .stored_weight import INT4, StoredWeight

FLOAT8_TERM = 16.0
_FLOAT8_TERM = constexpr(FLOAT8_TERM)
_INTEGER_TERM = constexpr(INTEGER_TERM)


@triton.jit
def _split_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    stride_m,
    stride_k,
    M,
    smallest,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLANES: tl.constexpr,
    TERMS: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Every program finds the scale of its whole row, then splits BLOCK_K columns of it; PLANES 2: even ones first."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    source = x_ptr + row.to(tl.int64) * stride_m
    lane = tl.arange(0, BLOCK_K)
    bits = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(source + (lane + start) * stride_k, mask=lane < K - start, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(activate(x, ACTIVATION)))
    largest = tl.max(bits, axis=0)
    if INTEGER:
        scale = largest.to(tl.float32, bitcast=True) * (1.0 / 127.0)
        scale = tl.where(scale < smallest, smallest, scale)
        inverse = 1.0 / scale
    else:
        # The largest magnitude lands in 128..256, by a power of two, so that no bit of x is lost.
        exponent = tl.minimum(tl.maximum(largest >> 23, 27), 254) - 7
        scale = tl.where(largest < 0x7F800000, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, scale)
    column = tl.program_id(1) * BLOCK_K + lane
    inside = column < K
    x = activate(tl.load(source + column * stride_k, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    rest = x * inverse
    target = q_ptr + row.to(tl.int64) * K + (column % PLANES) * (K // PLANES) + column // PLANES
    for term in tl.static_range(TERMS):
        if INTEGER:
            shifted = rest + 12582912.0
            part = shifted - 12582912.0
            tl.store(target + term * M * K, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
            rest = (rest - part) * _INTEGER_TERM
        else:
            stored = rest.to(tl.float8e4nv)
            tl.store(target + term * M * K, stored, mask=inside)
            rest = (rest - stored.to(tl.float32)) * _FLOAT8_TERM


_INT4_ASM = constexpr("""
{
shl.b32 $0, $2, 4;
and.b32 $0, $0, 0xf0f0f0f0;
and.b32 $1, $2, 0xf0f0f0f0;
}
""")


@triton.jit
def _int4_sixteenfold(packed, ASSEMBLY: tl.constexpr):
    """(even, odd) columns of packed signed 4-bit codes as int8, times 16."""
    if ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
            _INT4_ASM, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        even = (packed.to(tl.int32) << 4).to(tl.int8)
        odd = (packed.to(tl.int32) & 0xF0).to(tl.int8)
    return even, odd


@triton.jit
def _matmul_split_kernel(
    q_ptr,
    row_scale_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_wn,
    stride_out,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    TERM_ROWS: tl.constexpr,
    INTEGER: tl.constexpr,
    INT4: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Out (M, N), or with SPLITS > 1 (SPLITS, M, N) float32 partial products. BLOCK_K counts stored bytes.

    TERM_ROWS: power of two >= TERMS; BLOCK_M: power of two >= M.
    """
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    COLUMNS: tl.constexpr = TERM_ROWS * BLOCK_M
    BYTES: tl.constexpr = K // 2 if INT4 else K
    LENGTH: tl.constexpr = ((BYTES + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)) * BLOCK_K
    IMPRECISE: tl.constexpr = BLOCK_K if BLOCK_K < 128 else 128
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_n = tl.where(n < N, n, 0)
    line = tl.arange(0, COLUMNS)
    used = ((line // BLOCK_M) < TERMS) & ((line % BLOCK_M) < M)
    q_row = tl.where(used, (line // BLOCK_M) * M + line % BLOCK_M, 0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * LENGTH
    w_tile = w_ptr + safe_n.to(tl.int64)[:, None] * stride_wn + (first + lane)[None, :]
    acc = tl.zeros([BLOCK_N, COLUMNS], dtype=ACCUMULATOR)
    q_tile = q_ptr + q_row[None, :] * K + (first + lane)[:, None]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for step in range(0, LENGTH, BLOCK_K):
        if BYTES % (BLOCK_K * SPLITS) == 0:
            w = tl.load(w_tile + step)
            q = tl.load(q_tile + step)
        else:
            inside = lane < BYTES - first - step
            w = tl.load(w_tile + step, mask=inside[None, :], other=0.0)
            q = tl.load(q_tile + step, mask=inside[:, None], other=0.0)
        if INT4:
            even, odd = _int4_sixteenfold(w, ASSEMBLY)
            acc = tl.dot(even, q, acc, out_dtype=ACCUMULATOR)
            if BYTES % (BLOCK_K * SPLITS) == 0:
                q = tl.load(q_tile + BYTES + step)
            else:
                q = tl.load(q_tile + BYTES + step, mask=(lane < BYTES - first - step)[:, None], other=0.0)
            acc = tl.dot(odd, q, acc, out_dtype=ACCUMULATOR)
        elif INTEGER:
            acc = tl.dot(w, q, acc, out_dtype=ACCUMULATOR)
        else:
            # Hopper's FP8 units keep 14 bits of a running sum: move it to float32 every 128 columns.
            acc = tl.dot(w, q, acc, max_num_imprecise_acc=IMPRECISE)
    m = tl.arange(0, BLOCK_M)
    base = _INTEGER_TERM if INTEGER else _FLOAT8_TERM
    weight = tl.where(line // BLOCK_M == 0, 1.0, tl.where(line // BLOCK_M == 1, 1.0 / base, 1.0 / (base * base)))
    if INT4:
        weight = weight * 0.0625
    # Lines that only fill the tile hold row 0's product: times zero would let its NaN through to every row.
    terms = tl.where(used[None, :], acc.to(tl.float32) * weight[None, :], 0.0)
    total = tl.sum(tl.reshape(terms, [BLOCK_N, TERM_ROWS, BLOCK_M]), axis=1)
    total = total * tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    if SPLITS == 1:
        step_n = 1 if SCALE_PER_ROW else 0
        total = total * tl.load(scale_ptr + safe_n * step_n)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    target = out_ptr + tl.program_id(1).to(tl.int64) * M * stride_out + m[None, :] * stride_out + n[:, None]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def term_count(dtype: torch.dtype, integer: bool) -> int:
    """8-bit terms that carry an x of `dtype`: two for bfloat16 and for integers, three for float16's 11 bits."""
    return 2 if integer or dtype == torch.bfloat16 else 3


def split_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    activation: str | None = None,
    planes: int = 1,
    overlap: bool = False,
) -> None:
    """Split x (M, K), of any strides, into q (terms, M, K) int8 or e4m3 and scale (M,) float32, both written.

    With `overlap` a `matmul_split` launched right after, with `overlap` too, may start before this has ended.
    """
    terms, rows, columns = q.shape
    block = min(1024, power_of_two(columns))
    launch(
        _split_rows_kernel,
        (rows, ceil_div(columns, block), 1),
        (
            x,
            q,
            scale,
            x.stride(0),
            x.stride(1),
            rows,
            SMALLEST_SCALE,
        ),
        {
            "K": columns,
            "BLOCK_K": block,
            "PLANES": planes,
            "TERMS": terms,
            "INTEGER": q.dtype == torch.int8,
            "ACTIVATION": activation,
            "OVERLAP": overlap,
        },
    )


def matmul_split(
    q: torch.Tensor,
    row_scale: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    *,
    splits: int,
    assembly: bool,
    step: int = 128,
    stages: int,
    overlap: bool = False,
) -> None:
    """Weight-only product of split rows and an e4m3, e5m2, int8 or int4 weight into `out` (M, N).

    Args:
        q: (terms, M, K) from `split_rows` or `rotate_rows`, planes 2 for int4.
        row_scale: (M,) float32 from the same.
        weight: kind fp8, int8 or int4, in whatever basis x is; codes row by row.
        bias: (N,) or None.
        out: (M, N), last stride 1, written.
        partial: (splits, M, N) float32 work space, needed for splits > 1.
        splits: parts of K that are multiplied side by side.
        assembly: compiled for a GPU (the interpreter has no inline assembly).
        step: stored bytes of a row that are multiplied together, a power of two.
        stages: steps in flight.
        overlap: the kernel before is that one with `overlap`: start while it runs, then wait for it.
    """
    terms, rows, columns = q.shape
    integer = q.dtype == torch.int8
    single = splits == 1
    target = out if single else partial
    launch(
        _matmul_split_kernel,
        (ceil_div(weight.rows, 64), splits, 1),
        (
            q,
            row_scale,
            weight.data,
            weight.scale,
            weight.scale if bias is None else bias,
            target,
            rows,
            weight.rows,
            weight.data.stride(0),
            target.stride(-2),
        ),
        {
            "K": columns,
            "TERMS": terms,
            "TERM_ROWS": power_of_two(terms),
            "INTEGER": integer,
            "INT4": weight.kind == INT4,
            "ASSEMBLY": assembly,
            "SCALE_PER_ROW": weight.scale_mode == 2,
            "HAS_BIAS": bias is not None and single,
            "BLOCK_M": max(4, SMALLEST_DOT // power_of_two(terms), power_of_two(rows)),
            "BLOCK_N": 64,
            "BLOCK_K": step,
            "SPLITS": splits,
            "OVERLAP": overlap,
        },
        stages=stages,
        overlap=overlap,
    )
    if not single:
        sum_splits(partial, weight, bias, out, overlap)
