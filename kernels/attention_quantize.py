"""Q, K and V of 8-bit attention, quantized from any strides: Q and K rotated to int8, V to e4m3 with its keys in front."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .launch import launch
from .quantize_rows import SMALLEST_SCALE, magnitude_bits, scale_and_inverse, to_codes
from .runtime import INTERPRETED, ceil_div, constexpr, made_to_keep, power_of_two, tl, triton

KEY_BLOCK = 128
"""Keys whose codes share a scale; the attention kernels step through keys in blocks of this many, or of a part of it."""

CHUNKS = 16
"""Parts that the keys are summed in; the next kernel adds them up in one order, so that results repeat."""

LARGEST_SCALE = 1e30
"""Scales of queries end here: the softmax's factor in them could carry them out of float32."""

_STATISTICS_ROWS, _STATISTICS_WARPS = 32, 2
_QUERY_ROWS, _QUERY_WARPS = 64, 4
_KEY_WARPS = 4
_LARGEST_SCALE = constexpr(LARGEST_SCALE)


@dataclass(frozen=True)
class QuantizedAttention:
    """What the attention kernels read.

    q: (batch * heads, rows, D) int8, rows a multiple of the query block. q_scale: (batch * heads, rows) float32, with the
    softmax scale and log2(e) in it. k: (batch * kv_heads, padded keys, D) int8. k_scale: (batch * kv_heads, blocks) float32.
    v: (batch * kv_heads, D, padded keys) e4m3 in `key_order`, or None where values stay in 16 bits.
    v_scale: (batch * kv_heads, D) float32 or None. shift: (batch * heads, rows) float32, what taking K's mean off took
    from the scores (natural logarithm), or None.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor | None
    v_scale: torch.Tensor | None
    shift: torch.Tensor | None


def padded_head_dim(head_dim: int) -> int:
    """Columns of the codes: 64 or 128."""
    return max(64, power_of_two(head_dim))


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """Of a (batch or 1, keys) mask, from one batch and from one key to the next."""
    return (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1))


def key_order(position: torch.Tensor) -> torch.Tensor:
    """The key whose values lie at `position`: within 16, a product's 8-bit operand holds columns 2q, 2q+1, 2q+8, 2q+9
    where its result has four neighbours, so that weights go from one product to the next without leaving registers."""
    return (position & ~15) | (position >> 1 & 1) << 3 | (position >> 2 & 3) << 1 | (position & 1)


@functools.lru_cache(maxsize=16)
def sylvester(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction over `size` (a power of two, so that it is exact in 16 bits)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return made_to_keep(lambda: (matrix / size).to(device=device, dtype=dtype))


@triton.jit
def batch_and_head(pair, heads):
    """Of a pair of both, in 64 bits: offsets are made of them."""
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def _rows_of(x, head, rows, inside, stride_h, stride_l, stride_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows of one head as float32, zeros where `inside` is false and past the head dim."""
    column = tl.arange(0, D)
    where = x + head * stride_h + rows.to(tl.int64)[:, None] * stride_l + column.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _kept(mask, batch, rows, stride_b, stride_l, keys, HAS_MASK: tl.constexpr):
    """Which keys count: those that exist and are not masked."""
    inside = rows < keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + batch * stride_b + rows.to(tl.int64) * stride_l, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _rotated(x, rotation_ptr, D: tl.constexpr):
    """Rows of D columns times the Hadamard matrix at `rotation_ptr`."""
    i = tl.arange(0, D)
    matrix = tl.load(rotation_ptr + i[:, None] * D + i[None, :])
    return tl.dot(x.to(matrix.dtype), matrix)


@triton.jit
def _mean_of_keys(sums, counts, pair, keys, D: tl.constexpr, CHUNKS: tl.constexpr):
    """K's mean over the keys that count; the sums are over the number of all keys, so that they stay finite."""
    chunk = tl.arange(0, CHUNKS)
    column = tl.arange(0, D)
    total = tl.sum(tl.load(sums + (pair * CHUNKS + chunk)[:, None] * D + column[None, :]), 0)
    count = tl.sum(tl.load(counts + pair * CHUNKS + chunk), 0)
    return total * (keys.to(tl.float32) / tl.maximum(count, 1.0))


@triton.jit(do_not_specialize=("kv_heads", "keys"))
def _attention_statistics_kernel(
    k,
    v,
    mask,
    sums,
    counts,
    largest,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    mask_b,
    mask_l,
    kv_heads,
    keys,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Of one chunk of one head's keys: in one program K's sum and how many keys count, in another the largest |V| (as bits)
    per channel."""
    chunk, pair = tl.program_id(0), tl.program_id(1)
    batch, head = batch_and_head(pair, kv_heads)
    column = tl.arange(0, D)
    steps = tl.cdiv(keys, ROWS)
    each = tl.cdiv(steps, CHUNKS)
    place = pair * CHUNKS + chunk
    last = tl.minimum((chunk + 1) * each, steps)
    if tl.program_id(2) == 0:
        total = tl.zeros([D], tl.float32)
        count = tl.zeros([ROWS], tl.float32)
        share = 1.0 / keys.to(tl.float32)
        for step in range(chunk * each, last):
            rows = step * ROWS + tl.arange(0, ROWS)
            inside = _kept(mask, batch, rows, mask_b, mask_l, keys, HAS_MASK)
            total += tl.sum(_rows_of(k + batch * k_b, head, rows, inside, k_h, k_l, k_d, HEAD_DIM, D) * share, 0)
            count += inside.to(tl.float32)
        tl.store(sums + place * D + column, total)
        tl.store(counts + place, tl.sum(count, 0))
    elif VALUES:
        top = tl.zeros([D], tl.int32)
        for step in range(chunk * each, last):
            rows = step * ROWS + tl.arange(0, ROWS)
            inside = _kept(mask, batch, rows, mask_b, mask_l, keys, HAS_MASK)
            x = _rows_of(v + batch * v_b, head, rows, inside, v_h, v_l, v_d, HEAD_DIM, D)
            top = tl.maximum(top, tl.max(magnitude_bits(x), 0))
        tl.store(largest + place * D + column, top)


@triton.jit(do_not_specialize=("kv_heads", "keys"))
def _quantize_keys_values_kernel(
    k,
    v,
    mask,
    sums,
    counts,
    largest,
    rotation_ptr,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    mask_b,
    mask_l,
    kv_heads,
    keys,
    smallest,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """A block of one head's keys: in one program K without its mean, rotated, to int8; in another V to e4m3, transposed,
    in the products' order."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = batch_and_head(pair, kv_heads)
    column = tl.arange(0, D)
    place = tl.arange(0, ROWS)
    rows = block * ROWS + place
    inside = _kept(mask, batch, rows, mask_b, mask_l, keys, HAS_MASK)
    if tl.program_id(2) == 0:
        mean = _mean_of_keys(sums, counts, pair, keys, D, CHUNKS)
        x = _rows_of(k + batch * k_b, head, rows, inside, k_h, k_l, k_d, HEAD_DIM, D)
        # A quarter: the difference of two finite numbers may be none.
        x = _rotated(tl.where(inside[:, None], x * 0.25 - mean[None, :] * 0.25, 0.0), rotation_ptr, D)
        largest_of_all = tl.max(tl.reshape(magnitude_bits(x), [ROWS * D]), 0)
        scale, inverse = scale_and_inverse(largest_of_all, 127.0, smallest)
        tl.store(k_scale + pair * tl.num_programs(0) + block, scale)
        first = (pair.to(tl.int64) * tl.num_programs(0) + block) * ROWS
        tl.store(k_codes + (first + place)[:, None] * D + column[None, :], to_codes(x * inverse, True))
    elif VALUES:
        ordered = block * ROWS + ((place & ~15) | (((place >> 1) & 1) << 3) | (((place >> 2) & 3) << 1) | (place & 1))
        kept = _kept(mask, batch, ordered, mask_b, mask_l, keys, HAS_MASK)
        chunk = tl.arange(0, CHUNKS)
        top = tl.max(tl.load(largest + (pair * CHUNKS + chunk)[:, None] * D + column[None, :]), 0)
        channel_scale, channel_inverse = scale_and_inverse(top, 448.0, smallest)
        if block == 0:
            tl.store(v_scale + pair * D + column, channel_scale)
        values = _rows_of(v + batch * v_b, head, ordered, kept, v_h, v_l, v_d, HEAD_DIM, D) * channel_inverse[None, :]
        target = v_codes + (pair.to(tl.int64) * D + column)[:, None] * (tl.num_programs(0) * ROWS)
        tl.store(target + (block * ROWS + place)[None, :], tl.trans(to_codes(values, False)))


@triton.jit(do_not_specialize=("heads", "group", "queries", "keys"))
def _quantize_queries_kernel(
    q,
    sums,
    counts,
    rotation_ptr,
    codes,
    scales,
    shift,
    q_b,
    q_h,
    q_l,
    q_d,
    heads,
    group,
    queries,
    keys,
    softmax_scale,
    smallest,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Rows of one head's queries, rotated, to int8 with a scale per row that holds everything a score is multiplied by."""
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = batch_and_head(pair, heads)
    column = tl.arange(0, D)
    rows = block * ROWS + tl.arange(0, ROWS)
    x = _rows_of(q + batch * q_b, head, rows, rows < queries, q_h, q_l, q_d, HEAD_DIM, D)
    place = pair.to(tl.int64) * (tl.num_programs(0) * ROWS) + rows
    if SHIFT:
        mean = _mean_of_keys(sums, counts, pair // group, keys, D, CHUNKS)
        tl.store(shift + place, tl.sum(x * mean[None, :], 1) * softmax_scale)
    if softmax_scale < 0:
        x = -x
    x = _rotated(x, rotation_ptr, D)
    scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), 1), 127.0, smallest)
    # Both rotations leave 1 / sqrt(D) too much, and K's a quarter: 4 D times the scores of exact attention.
    factor = scale * (tl.abs(softmax_scale) * 1.4426950408889634 * 4 * D)
    tl.store(scales + place, tl.where(factor > _LARGEST_SCALE, _LARGEST_SCALE, factor))
    tl.store(codes + place[:, None] * D + column[None, :], to_codes(x * inverse[:, None], True))


def quantize_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    query_block: int,
    fp8_values: bool,
    shift: bool = False,
) -> QuantizedAttention:
    """Quantizes (batch, heads, length, head_dim) tensors of any strides, float16 or bfloat16, head dim up to 128.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        v: as k.
        mask: (batch or 1, keys) bool, True where a key counts; what is in the others is not read.
        scale: of the scores, of either sign.
        query_block: rows of codes are a multiple of it, itself a multiple of 64.
        fp8_values: quantize V too.
        shift: fill `shift`, which the log-sum-exp needs.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    d = padded_head_dim(head_dim)
    pairs, blocks = batch * kv_heads, ceil_div(keys, KEY_BLOCK)
    rows = ceil_div(queries, query_block) * query_block
    device = q.device
    floats = functools.partial(torch.empty, dtype=torch.float32, device=device)
    sums, counts = floats(pairs, CHUNKS, d), floats(pairs, CHUNKS)
    largest = torch.empty(pairs if fp8_values else 0, CHUNKS, d, dtype=torch.int32, device=device)
    matrix = sylvester(d, device, torch.float32 if INTERPRETED else torch.bfloat16)
    k_codes = torch.empty(pairs, blocks * KEY_BLOCK, d, dtype=torch.int8, device=device)
    k_scale = floats(pairs, blocks)
    v_codes = (
        torch.empty(pairs, d, blocks * KEY_BLOCK, dtype=torch.float8_e4m3fn, device=device) if fp8_values else None
    )
    v_scale = floats(pairs, d) if fp8_values else None
    q_codes, q_scale = torch.empty(batch * heads, rows, d, dtype=torch.int8, device=device), floats(batch * heads, rows)
    shifts = floats(batch * heads, rows) if shift else None
    kept = k if mask is None else mask
    kinds = {"CHUNKS": CHUNKS, "VALUES": fp8_values, "HAS_MASK": mask is not None}
    launch(
        _attention_statistics_kernel,
        (CHUNKS, pairs, 2 if fp8_values else 1),
        (k, v, kept, sums, counts, largest, *k.stride(), *v.stride(), *mask_strides(mask), kv_heads, keys),
        {"HEAD_DIM": head_dim, "D": d, "ROWS": _STATISTICS_ROWS, **kinds},
        warps=_STATISTICS_WARPS,
    )
    launch(
        _quantize_keys_values_kernel,
        (blocks, pairs, 2 if fp8_values else 1),
        (
            k, v, kept, sums, counts, largest, matrix,
            k_codes, k_scale, k_codes if v_codes is None else v_codes, k_scale if v_scale is None else v_scale,
            *k.stride(), *v.stride(), *mask_strides(mask), kv_heads, keys, SMALLEST_SCALE,
        ),
        {"HEAD_DIM": head_dim, "D": d, "ROWS": KEY_BLOCK, **kinds},
        warps=_KEY_WARPS,
    )  # fmt: skip
    launch(
        _quantize_queries_kernel,
        (rows // _QUERY_ROWS, batch * heads, 1),
        (
            q, sums, counts, matrix, q_codes, q_scale, q_scale if shifts is None else shifts,
            *q.stride(), heads, heads // kv_heads, queries, keys, scale, SMALLEST_SCALE,
        ),
        {"HEAD_DIM": head_dim, "D": d, "ROWS": _QUERY_ROWS, "CHUNKS": CHUNKS, "SHIFT": shift},
        warps=_QUERY_WARPS,
    )  # fmt: skip
    return QuantizedAttention(q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, shifts)
