"""Attention with int8 scores and e4m3 or 16-bit values, for every GPU from cc 8.0 on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .attention_quantize import KEY_BLOCK, QuantizedAttention, batch_and_head, mask_strides
from .launch import launch
from .runtime import AMPERE, BLACKWELL, GEFORCE_BLACKWELL, HOPPER, INTERPRETED, constexpr, tl, triton

VALUE_SHIFT = math.log2(448)
"""Weights are at most 448 before they become e4m3, whose largest number that is: a weight of one stays exact."""

LARGEST_FACTOR = 0.5
"""Of an integer score: those of finite inputs stay below 2^20, where the maximum and the fused multiply and subtract that
follows agree to a sixteenth. Past that a softmax tells keys apart that differ by less than rounding."""

NO_SCORE = -1e30
"""Stands for a score of minus infinity: differences of two of them are numbers."""

_NO_SCORE = constexpr(NO_SCORE)
_INTERPRETED = constexpr(INTERPRETED)
_LARGEST_FACTOR = constexpr(LARGEST_FACTOR)


class AttentionTiles(NamedTuple):
    """Launch settings. rows, keys: of the tile of scores, keys a divisor of KEY_BLOCK."""

    rows: int
    keys: int
    warps: int
    stages: int


# By compute capability: tiles with e4m3 values, and with 16-bit ones. The first row whose capability is not above the
# GPU's holds. Hopper's were swept on an H200; the others fit their shared memory and are untimed.
TILES: tuple[tuple[tuple[int, int], AttentionTiles, AttentionTiles], ...] = (
    (GEFORCE_BLACKWELL, AttentionTiles(128, 64, 8, 3), AttentionTiles(128, 64, 8, 2)),
    (BLACKWELL, AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 128, 8, 2)),
    (HOPPER, AttentionTiles(64, 128, 4, 2), AttentionTiles(128, 128, 8, 2)),
    ((8, 6), AttentionTiles(128, 64, 8, 3), AttentionTiles(128, 64, 8, 2)),
    (AMPERE, AttentionTiles(128, 64, 8, 3), AttentionTiles(128, 64, 8, 3)),
)


def tiles_for(capability: tuple[int, int], fp8_values: bool) -> AttentionTiles:
    """The launch settings of a GPU."""
    row = next((row for row in TILES if row[0] <= capability), TILES[-1])
    return row[1] if fp8_values else row[2]


@triton.jit
def _attend_block(
    acc,
    total,
    highest,
    q,
    q_scales,
    start,
    k,
    k_scale,
    v,
    mask,
    v_l,
    v_d,
    mask_l,
    keys,
    padded_keys,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    SHIFT: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One block of keys: k, k_scale, v and mask point at their head's (batch's) first."""
    column = tl.arange(0, D)
    place = start + tl.arange(0, N)
    k_tile = tl.load(k + column[:, None] + place[None, :] * D)
    scores = tl.dot(q, k_tile, out_dtype=tl.int32)
    factor = q_scales * tl.load(k_scale + start // KEY_BLOCK)
    factor = tl.where(factor > _LARGEST_FACTOR, _LARGEST_FACTOR, factor)  # NaN stays
    if BOUNDED:
        counts = place < keys
        if HAS_MASK:
            counts = counts & (tl.load(mask + place.to(tl.int64) * mask_l, mask=counts, other=0) != 0)
        x = tl.where(counts[None, :], scores.to(tl.float32) * factor[:, None], _NO_SCORE)
        now = tl.maximum(highest, tl.max(x, 1))
        x = x - (now - SHIFT)[:, None]
    else:
        # The largest of the integers costs less than that of the floats.
        now = tl.maximum(highest, tl.max(scores, 1).to(tl.float32) * factor)
        x = scores.to(tl.float32) * factor[:, None] - (now - SHIFT)[:, None]
    p = tl.math.exp2(x)
    rescale = tl.math.exp2(highest - now)
    total = total * rescale + tl.sum(p, 1)
    if FP8:
        v_tile = tl.load(v + place[:, None] + column[None, :] * padded_keys)
        weights = tl.reshape(p.to(tl.float8e4nv), [M, N // 16, 2, 4, 2])
        weights = tl.reshape(tl.permute(weights, (0, 1, 3, 2, 4)), [M, N])
        # A sum of its own for each block: Hopper adds FP8 products up in 14 bits.
        acc = acc * rescale[:, None] + tl.dot(weights, v_tile)
    else:
        where = v + place.to(tl.int64)[:, None] * v_l + column.to(tl.int64)[None, :] * v_d
        inside = (column < HEAD_DIM)[None, :]
        if BOUNDED:
            inside = inside & (place < keys)[:, None]
        v_tile = tl.load(where, mask=inside, other=0.0)
        weights = p.to(v_tile.dtype)
        if _INTERPRETED:  # which takes bfloat16 operands for integers
            weights, v_tile = weights.to(tl.float32), v_tile.to(tl.float32)
        acc = tl.dot(weights, v_tile, acc * rescale[:, None])
    return acc, total, now


@triton.jit(do_not_specialize=("heads", "group", "queries", "keys"))
def _attention_int8_kernel(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    mask,
    shift,
    out,
    lse,
    v_b,
    v_h,
    v_l,
    v_d,
    mask_b,
    mask_l,
    out_b,
    out_h,
    out_l,
    heads,
    group,
    queries,
    rows,
    keys,
    padded_keys,
    limit,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LSE: tl.constexpr,
):
    """One block of one head's queries over all of its keys, the last block of them first: it alone may be ragged."""
    pair = tl.program_id(1)
    batch, head = batch_and_head(pair, heads)
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, D)
    first = pair.to(tl.int64) * rows
    q_tile = tl.load(q + (first + row)[:, None] * D + column[None, :])
    q_scales = tl.load(q_scale + first + row)
    source = pair // group
    blocks = padded_keys // KEY_BLOCK
    k += source.to(tl.int64) * padded_keys * D
    k_scale += source * blocks
    if FP8:
        v += source.to(tl.int64) * D * padded_keys
    else:
        v += batch * v_b + head // group * v_h
    if HAS_MASK:
        mask += batch * mask_b
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    highest = tl.full([M], _NO_SCORE, tl.float32)
    last = (keys - 1) // N * N
    acc, total, highest = _attend_block(
        acc, total, highest, q_tile, q_scales, last, k, k_scale, v, mask, v_l, v_d, mask_l, keys, padded_keys,
        HEAD_DIM, D, M, N, KEY_BLOCK, FP8, SHIFT, True, HAS_MASK,
    )  # fmt: skip
    for start in tl.range(0, last, N):
        acc, total, highest = _attend_block(
            acc, total, highest, q_tile, q_scales, start, k, k_scale, v, mask, v_l, v_d, mask_l, keys, padded_keys,
            HEAD_DIM, D, M, N, KEY_BLOCK, FP8, SHIFT, HAS_MASK, HAS_MASK,
        )  # fmt: skip
    # Where no key counts, what was added up are weights of keys without values.
    some = highest > 0.5 * _NO_SCORE
    inverse = tl.where(some, 1.0 / total, 0.0)
    result = acc * inverse[:, None]
    if FP8:
        result = result * tl.load(v_scale + source * D + column)[None, :]
    inside = row < queries
    result = tl.where(result > limit, limit, tl.where(result < -limit, -limit, result))
    where = out + batch * out_b + head * out_h + row.to(tl.int64)[:, None] * out_l + column[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=inside[:, None] & (column < HEAD_DIM)[None, :])
    if LSE:
        exponent = (highest + tl.log2(total) - SHIFT) * 0.6931471805599453 + tl.load(shift + first + row)
        exponent = tl.where(some, exponent, -float("inf"))
        tl.store(lse + pair.to(tl.int64) * queries + row, exponent, mask=inside)


def attend_int8(
    quantized: QuantizedAttention,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: AttentionTiles,
) -> None:
    """Writes attention over quantized Q and K into `out`.

    Args:
        quantized: of the q, k and v that are attended; its rows are a multiple of `tiles.rows`.
        v: (batch, kv_heads, keys, head_dim) float16 or bfloat16, any strides; read where `quantized.v` is None, and then
            finite also where it is masked.
        mask: (batch or 1, keys) bool, True where a key counts.
        out: (batch, heads, queries, head_dim) of last stride 1, float16 or bfloat16.
        lse: (batch, heads, queries) float32, contiguous, or None; needs `quantized.shift`.
        tiles: launch settings.
    """
    batch, heads, queries, head_dim = out.shape
    kv_heads, keys = v.shape[1:3]
    fp8 = quantized.v is not None
    rows = quantized.q.shape[1]
    launch(
        _attention_int8_kernel,
        (rows // tiles.rows, batch * heads, 1),
        (
            quantized.q, quantized.q_scale, quantized.k, quantized.k_scale,
            quantized.v if quantized.v is not None else v,
            quantized.v_scale if quantized.v_scale is not None else quantized.k_scale,
            v if mask is None else mask, quantized.shift if quantized.shift is not None else quantized.q_scale,
            out, quantized.q_scale if lse is None else lse, *v.stride(), *mask_strides(mask), *out.stride()[:3],
            heads, heads // kv_heads, queries, rows, keys, quantized.k.shape[1], torch.finfo(out.dtype).max,
        ),
        {
            "HEAD_DIM": head_dim, "D": quantized.q.shape[2], "M": tiles.rows, "N": tiles.keys, "KEY_BLOCK": KEY_BLOCK,
            "FP8": fp8, "SHIFT": VALUE_SHIFT if fp8 else 0.0, "HAS_MASK": mask is not None, "LSE": lse is not None,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
