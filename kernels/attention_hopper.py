"""The 8-bit attention of Hopper, in Gluon: one warp copies, three groups of four warps each attend 64 rows to what it brings."""

from __future__ import annotations

import torch

from .attention_int8 import LARGEST_FACTOR, NO_SCORE, VALUE_SHIFT
from .attention_quantize import KEY_BLOCK, QuantizedAttention, mask_strides
from .launch import in_blocks, launch
from .runtime import constexpr, gl, gluon, hopper, multiprocessor_count

GROUPS = 3
ROWS = 64
QUERY_BLOCK = GROUPS * ROWS
"""Queries of a program: a tile of fewer rows reads K and V from the L2 cache faster than that cache can give them."""

STAGES = 2
REGISTERS = 160
_NO_SCORE = constexpr(NO_SCORE)
_LARGEST_FACTOR = constexpr(LARGEST_FACTOR)
_GROUPS = constexpr(GROUPS)
_ROWS = constexpr(ROWS)
_STAGES = constexpr(STAGES)
_REGISTERS = constexpr(REGISTERS)


@gluon.jit
def _place_of(tile, tiles, heads, group):
    """(pair of batch and head, batch, head, head of K and V, first row) of a tile; those of a pair follow each other."""
    pair = tile // tiles
    batch = pair // heads
    head = pair % heads
    return pair, batch, head, head // group, tile % tiles * (_GROUPS * _ROWS)


@gluon.jit
def _copy_blocks(
    q, k, v, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles, all_tiles, heads, group, rows, padded_keys, D: gl.constexpr, N: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """The warp that copies: for each tile its queries, then blocks of keys and values, the last one first."""
    blocks = padded_keys // N
    count = 0
    for tile in range(gl.program_id(0), all_tiles, gl.num_programs(0)):
        pair, batch, head, kv_head, row = _place_of(tile, tiles, heads, group)
        source = pair // group
        hopper.mbarrier.wait(q_empty, (count // blocks) & 1 ^ 1)
        hopper.mbarrier.expect(q_full, _GROUPS * _ROWS * D)
        for index in gl.static_range(_GROUPS):
            start = pair * rows + row + index * _ROWS
            hopper.tma.async_copy_global_to_shared(q, [start, 0], q_full, q_tile.index(index))
        for step in range(blocks):
            stage = count % _STAGES
            phase = (count // _STAGES) & 1 ^ 1
            start = (blocks - 1 - step) * N
            full = k_full.index(stage)
            hopper.mbarrier.wait(k_empty.index(stage), phase)
            hopper.mbarrier.expect(full, N * D)
            hopper.tma.async_copy_global_to_shared(k, [source * padded_keys + start, 0], full, k_tiles.index(stage))
            full = v_full.index(stage)
            hopper.mbarrier.wait(v_empty.index(stage), phase)
            if FP8:
                hopper.mbarrier.expect(full, N * D)
                hopper.tma.async_copy_global_to_shared(v, [source * D, start], full, v_tiles.index(stage))
            else:
                hopper.mbarrier.expect(full, N * D * 2)
                hopper.tma.async_copy_global_to_shared(v, [batch, kv_head, start, 0], full, v_tiles.index(stage))
            count += 1


@gluon.jit
def _attend_step(
    acc, total, highest, step, start, q_tile, q_scales, k_tiles, k_scale, v_tiles, mask, mask_l, keys, ours, next_turn,
    k_full, k_empty, v_full, v_empty, SCORES: gl.constexpr, RESULT: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
    FP8: gl.constexpr, SHIFT: gl.constexpr, BOUNDED: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """One group's 64 rows over one block of keys, the program's block number `step`."""
    stage = step % _STAGES
    phase = (step // _STAGES) & 1
    zero = gl.zeros([_ROWS, N], gl.int32, layout=SCORES)
    factor = q_scales * gl.load(k_scale + start // N)
    factor = gl.where(factor > _LARGEST_FACTOR, _LARGEST_FACTOR, factor)  # NaN stays
    hopper.mbarrier.wait(k_full.index(stage), phase)
    if not FP8:
        # The groups take turns at the tensor cores, so that one's exponentials run under another's products.
        hopper.mbarrier.wait(ours, step & 1)
    token = hopper.warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = hopper.warpgroup_mma_wait(0, deps=[token])
    if not FP8:
        hopper.mbarrier.arrive(next_turn)
    hopper.mbarrier.arrive(k_empty.index(stage))
    if BOUNDED:
        place = start + gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
        counts = place < keys
        if HAS_MASK:
            counts = counts & (gl.load(mask + place.to(gl.int64) * mask_l, mask=counts, other=0) != 0)
        x = gl.where(gl.expand_dims(counts, 0), scores.to(gl.float32) * gl.expand_dims(factor, 1), _NO_SCORE)
        now = gl.maximum(highest, gl.max(x, 1))
        x = x - gl.expand_dims(now - SHIFT, 1)
    else:
        # The largest of the integers costs less than that of the floats.
        now = gl.maximum(highest, gl.max(scores, 1).to(gl.float32) * factor)
        x = scores.to(gl.float32) * gl.expand_dims(factor, 1) - gl.expand_dims(now - SHIFT, 1)
    p = gl.exp2(x)
    rescale = gl.exp2(highest - now)
    total = total * rescale + gl.sum(p, 1)
    wide_rescale = gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, RESULT)), 1)
    if FP8:
        weights = p.to(gl.float8e4nv).reshape([_ROWS, N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([_ROWS, N])
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, RESULT, 4))
        hopper.mbarrier.wait(v_full.index(stage), phase)
        # A sum of its own for each block: Hopper adds FP8 products up in 14 bits.
        values = v_tiles.index(stage).permute((1, 0))
        token = hopper.warpgroup_mma(operand, values, acc, use_acc=False, is_async=True)
        acc = acc * wide_rescale + hopper.warpgroup_mma_wait(0, deps=[token])
    else:
        operand = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, RESULT, 2))
        hopper.mbarrier.wait(v_full.index(stage), phase)
        values = v_tiles.index(stage).reshape([N, D])
        token = hopper.warpgroup_mma(operand, values, acc * wide_rescale, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[token])
    hopper.mbarrier.arrive(v_empty.index(stage))
    return acc, total, now


@gluon.jit
def _attend_rows(
    q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_scale, k_scale, v_scale, mask,
    shift, out, lse, mask_b, mask_l, out_b, out_h, out_l, tiles, all_tiles, heads, group, queries, rows, keys, padded_keys,
    limit, INDEX: gl.constexpr, HEAD_DIM: gl.constexpr, D: gl.constexpr, N: gl.constexpr, FP8: gl.constexpr,
    SHIFT: gl.constexpr, HAS_MASK: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One group's 64 rows of each tile over all keys, the last block of them first: it alone may be ragged."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    blocks = padded_keys // N
    ours = turns.index(INDEX)
    next_turn = turns.index((INDEX + 1) % _GROUPS)
    q = q_tile.index(INDEX)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, RESULT))
    count = 0
    for tile in range(gl.program_id(0), all_tiles, gl.num_programs(0)):
        pair, batch, head, kv_head, first_row = _place_of(tile, tiles, heads, group)
        source = pair // group
        first = pair.to(gl.int64) * rows
        row = first_row + INDEX * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SCORES))
        q_scales = gl.load(q_scale + first + row)
        k_scales = k_scale + source * blocks
        head_mask = mask
        if HAS_MASK:
            head_mask += batch.to(gl.int64) * mask_b
        acc = gl.zeros([_ROWS, D], gl.float32, layout=RESULT)
        total = gl.zeros([_ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
        highest = gl.full([_ROWS], _NO_SCORE, gl.float32, layout=gl.SliceLayout(1, SCORES))
        hopper.mbarrier.wait(q_full, (count // blocks) & 1)
        acc, total, highest = _attend_step(
            acc, total, highest, count, (blocks - 1) * N, q, q_scales, k_tiles, k_scales, v_tiles, head_mask, mask_l, keys,
            ours, next_turn, k_full, k_empty, v_full, v_empty, SCORES, RESULT, D, N, FP8, SHIFT, True, HAS_MASK,
        )  # fmt: skip
        for step in range(1, blocks):
            acc, total, highest = _attend_step(
                acc, total, highest, count + step, (blocks - 1 - step) * N, q, q_scales, k_tiles, k_scales, v_tiles,
                head_mask, mask_l, keys, ours, next_turn, k_full, k_empty, v_full, v_empty, SCORES, RESULT, D, N, FP8,
                SHIFT, HAS_MASK, HAS_MASK,
            )  # fmt: skip
        # The next tile's queries, keys and values come while this one is written.
        hopper.mbarrier.arrive(q_empty)
        count += blocks
        # Where no key counts, what was added up are weights of keys without values.
        some = highest > 0.5 * _NO_SCORE
        inverse = gl.where(some, 1.0 / total, 0.0)
        result = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, RESULT)), 1)
        if FP8:
            result = result * gl.expand_dims(gl.load(v_scale + source * D + column), 0)
        result = gl.where(result > limit, limit, gl.where(result < -limit, -limit, result))
        row_out = first_row + INDEX * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, RESULT))
        where = out + batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        where += gl.expand_dims(row_out.to(gl.int64) * out_l, 1) + gl.expand_dims(column, 0)
        inside = gl.expand_dims(row_out < queries, 1) & gl.expand_dims(column < HEAD_DIM, 0)
        gl.store(where, result.to(out.dtype.element_ty), mask=inside)
        if LSE:
            exponent = (highest + gl.log2(total) - SHIFT) * 0.6931471805599453 + gl.load(shift + first + row)
            target = lse + pair.to(gl.int64) * queries + row
            gl.store(target, gl.where(some, exponent, -float("inf")), mask=row < queries)


@gluon.jit(do_not_specialize=("tiles", "all_tiles", "heads", "group", "queries", "keys"))
def _attention_hopper_kernel(
    q, k, v, q_scale, k_scale, v_scale, mask, shift, out, lse, mask_b, mask_l, out_b, out_h, out_l,
    tiles, all_tiles, heads, group, queries, rows, keys, padded_keys, limit,
    HEAD_DIM: gl.constexpr, D: gl.constexpr, N: gl.constexpr, FP8: gl.constexpr, SHIFT: gl.constexpr,
    HAS_MASK: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """Tiles of 192 of one head's queries over all of its keys, as many programs as the GPU runs at once."""
    q_tile = gl.allocate_shared_memory(gl.int8, [_GROUPS, _ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.int8, [_STAGES, N, D], k.layout)
    if FP8:
        v_tiles = gl.allocate_shared_memory(v.dtype, [_STAGES, D, N], v.layout)
    else:
        v_tiles = gl.allocate_shared_memory(v.dtype, [_STAGES, 1, 1, N, D], v.layout)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [_GROUPS, 1], BARRIER)
    hopper.mbarrier.init(q_full, count=1)
    hopper.mbarrier.init(q_empty, count=_GROUPS)
    for i in gl.static_range(_STAGES):
        hopper.mbarrier.init(k_full.index(i), count=1)
        hopper.mbarrier.init(v_full.index(i), count=1)
        hopper.mbarrier.init(k_empty.index(i), count=_GROUPS)
        hopper.mbarrier.init(v_empty.index(i), count=_GROUPS)
    for i in gl.static_range(_GROUPS):
        hopper.mbarrier.init(turns.index(i), count=1)
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(turns.index(0))
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_attend_rows, (
                q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_scale, k_scale,
                v_scale, mask, shift, out, lse, mask_b, mask_l, out_b, out_h, out_l, tiles, all_tiles, heads, group, queries,
                rows, keys, padded_keys, limit, FIRST, HEAD_DIM, D, N, FP8, SHIFT, HAS_MASK, LSE,
            )),
            (_attend_rows, (
                q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_scale, k_scale,
                v_scale, mask, shift, out, lse, mask_b, mask_l, out_b, out_h, out_l, tiles, all_tiles, heads, group, queries,
                rows, keys, padded_keys, limit, SECOND, HEAD_DIM, D, N, FP8, SHIFT, HAS_MASK, LSE,
            )),
            (_attend_rows, (
                q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_scale, k_scale,
                v_scale, mask, shift, out, lse, mask_b, mask_l, out_b, out_h, out_l, tiles, all_tiles, heads, group, queries,
                rows, keys, padded_keys, limit, THIRD, HEAD_DIM, D, N, FP8, SHIFT, HAS_MASK, LSE,
            )),
            (_copy_blocks, (
                q, k, v, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tiles, all_tiles, heads, group, rows, padded_keys, D, N, FP8,
            )),
        ],
        [4, 4, 1],
        [_REGISTERS, _REGISTERS, 24],
    )  # fmt: skip


def can_copy_in_bulk(v: torch.Tensor) -> bool:
    """Whether the copy engine takes rows of this (batch, heads, length, head_dim) tensor as they lie."""
    size = v.element_size()
    return (
        v.stride(3) == 1
        and v.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in v.stride()[:3])
    )


def attend_hopper(
    quantized: QuantizedAttention,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """`attention_int8.attend_int8` for cc 9.0: the same arguments and results; quantized for QUERY_BLOCK rows.

    v: where its values are read in 16 bits, one that `can_copy_in_bulk`.
    """
    batch, heads, queries, head_dim = out.shape
    kv_heads, keys = v.shape[1:3]
    d, padded_keys, rows = quantized.q.shape[2], quantized.k.shape[1], quantized.q.shape[1]
    fp8 = quantized.v is not None
    if quantized.v is not None:
        values = in_blocks(quantized.v.view(-1, padded_keys), d, KEY_BLOCK)
    else:
        values = in_blocks(v, 1, 1, KEY_BLOCK, d)
    tiles = rows // QUERY_BLOCK
    all_tiles = tiles * batch * heads
    launch(
        _attention_hopper_kernel,
        (min(all_tiles, multiprocessor_count(out.device.index or 0)), 1, 1),
        (
            in_blocks(quantized.q.view(-1, d), ROWS, d), in_blocks(quantized.k.view(-1, d), KEY_BLOCK, d), values,
            quantized.q_scale, quantized.k_scale,
            quantized.k_scale if quantized.v_scale is None else quantized.v_scale, out if mask is None else mask,
            quantized.q_scale if quantized.shift is None else quantized.shift, out,
            quantized.q_scale if lse is None else lse, *mask_strides(mask), *out.stride()[:3],
            tiles, all_tiles, heads, heads // kv_heads, queries, rows, keys, padded_keys, torch.finfo(out.dtype).max,
        ),
        {
            "HEAD_DIM": head_dim, "D": d, "N": KEY_BLOCK, "FP8": fp8, "SHIFT": VALUE_SHIFT if fp8 else 0.0,
            "HAS_MASK": mask is not None, "LSE": lse is not None,
        },
        warps=4,
    )  # fmt: skip
