"""Attention of one token over a key-value cache whose length the GPU knows: grouped queries, split along the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .launch import launch
from .runtime import ceil_div, kernels_run_on, multiprocessor_count, power_of_two, tl, triton

_TILE_NBYTES = 16 << 10
_MOST_SPLITS = 64


def attend_cache_reference(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, D) attention of q (H, D) over the first `length` slots of (KV, slots, D), and (KV, length) what each gathered.

    What a slot gathers is its probability, added up over the query heads that share its key head.
    """
    groups = q.shape[0] // key.shape[0]
    keys, values = key[:, :length], value[:, :length]
    scores = q.view(key.shape[0], groups, -1).float() @ keys.float().transpose(1, 2) * scale
    probabilities = scores.softmax(dim=-1)
    out = (probabilities @ values.float()).reshape(q.shape).to(q.dtype)
    return out, probabilities.sum(dim=1)


@triton.jit
def _attend_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    step_ptr,
    part_ptr,
    largest_ptr,
    sum_ptr,
    score_ptr,
    start,
    slots,
    scale,
    stride_cache,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (kv, split): the queries of one key head over one part of the cache, unnormalized."""
    kv = tl.program_id(0)
    split = tl.program_id(1)
    length = tl.minimum(start + tl.load(step_ptr).to(tl.int32) + 1, slots)
    part = ((length + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N)) * BLOCK_N
    first = split * part
    last = tl.minimum(first + part, length)
    group = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    inside = (group < GROUPS)[None, :] & (column < D)[:, None]
    q = tl.load(q_ptr + (kv * GROUPS + group)[None, :] * D + column[:, None], mask=inside, other=0.0)
    largest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_G], dtype=tl.float32)
    base = kv.to(tl.int64) * stride_cache
    for begin in range(first, last, BLOCK_N):
        slot = begin + lane
        valid = slot < last
        offset = base + slot.to(tl.int64) * D
        keys = tl.load(
            key_ptr + offset[:, None] + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0
        )
        scores = tl.dot(keys, q, input_precision="ieee") * scale
        scores = tl.where(valid[:, None], scores, float("-inf"))
        if KEEPS_SCORES:
            place = (kv * GROUPS + group).to(tl.int64)[None, :] * slots + slot[:, None]
            tl.store(score_ptr + place, scores, mask=valid[:, None] & (group < GROUPS)[None, :])
        risen = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp(largest - risen)
        weight = tl.exp(scores - risen[None, :])
        total = total * shrink + tl.sum(weight, axis=0)
        values = tl.load(
            value_ptr + offset[None, :] + column[:, None], mask=valid[None, :] & (column < D)[:, None], other=0.0
        )
        acc = tl.dot(values, weight.to(values.dtype), acc * shrink[None, :], input_precision="ieee")
        largest = risen
    place = (kv * SPLITS + split) * BLOCK_G + group
    tl.store(largest_ptr + place, largest)
    tl.store(sum_ptr + place, total)
    tl.store(part_ptr + place[None, :] * BLOCK_D + column[:, None], acc)


@triton.jit
def _combine(largest_ptr, sum_ptr, place, used):
    """(factor of each part, sum of all) of one query from the largest scores and sums of its parts."""
    largest = tl.load(largest_ptr + place, mask=used, other=float("-inf"))
    top = tl.max(largest, axis=0)
    factor = tl.exp(largest - top)
    return factor, tl.sum(factor * tl.load(sum_ptr + place, mask=used, other=0.0), axis=0), top


@triton.jit
def _join_kernel(
    part_ptr,
    largest_ptr,
    sum_ptr,
    out_ptr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program h: the parts of query head h put together."""
    head = tl.program_id(0)
    split = tl.arange(0, BLOCK_SPLITS)
    column = tl.arange(0, BLOCK_D)
    used = split < SPLITS
    place = ((head // GROUPS) * SPLITS + split) * BLOCK_G + head % GROUPS
    factor, total, _ = _combine(largest_ptr, sum_ptr, place, used)
    parts = tl.load(part_ptr + place[:, None] * BLOCK_D + column[None, :], mask=used[:, None], other=0.0)
    joined = tl.sum(parts * factor[:, None], axis=0) / total
    tl.store(out_ptr + head * D + column, joined.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _gather_kernel(
    score_ptr,
    largest_ptr,
    sum_ptr,
    step_ptr,
    gathered_ptr,
    start,
    slots,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (kv, block): adds to every slot the probabilities that it was given by the queries of its key head."""
    kv = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.minimum(start + tl.load(step_ptr).to(tl.int32) + 1, slots)
    inside = slot < length
    split = tl.arange(0, BLOCK_SPLITS)
    used = split < SPLITS
    gathered = tl.load(gathered_ptr + kv * slots + slot, mask=inside, other=0.0)
    for group in tl.static_range(GROUPS):
        place = (kv * SPLITS + split) * BLOCK_G + group
        _, total, top = _combine(largest_ptr, sum_ptr, place, used)
        score = tl.load(score_ptr + (kv * GROUPS + group) * slots + slot, mask=inside, other=float("-inf"))
        gathered += tl.exp(score - top) / total
    tl.store(gathered_ptr + kv * slots + slot, gathered, mask=inside)


def attend_cache(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: torch.Tensor,
    start: int,
    scale: float,
    gathered: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q @ keys.T * scale) @ values over the slots that are filled: min(start + step + 1, slots).

    Args:
        q: (H, D) contiguous query heads of one token; H is a multiple of KV.
        key, value: (KV, slots, D) contiguous.
        step: one int32 or int64 on the device.
        start: slots filled before step 0.
        scale: of the scores.
        gathered: (KV, slots) float32; what every slot gathers is added to it.

    Returns:
        (H, D) in q's dtype.
    """
    heads, width = q.shape
    kv_heads, slots, _ = key.shape
    if not kernels_run_on(q):
        length = min(start + int(step) + 1, slots)
        if gathered is None:
            keys, values = key[None, :, :length], value[None, :, :length]
            out = F.scaled_dot_product_attention(
                q[None, :, None], keys, values, scale=scale, enable_gqa=heads != kv_heads
            )
            return out.reshape(q.shape)
        out, probabilities = attend_cache_reference(q, key, value, length, scale)
        gathered[:, :length] += probabilities
        return out
    groups = heads // kv_heads
    block_g, block_d = max(16, power_of_two(groups)), power_of_two(width)
    block_n = min(64, max(16, _TILE_NBYTES // (block_d * key.element_size())))
    splits = _choose_splits(kv_heads, slots, block_n, q.device)
    device = q.device
    part = torch.empty((kv_heads, splits, block_g, block_d), dtype=torch.float32, device=device)
    largest, total = torch.empty((2, kv_heads, splits, block_g), dtype=torch.float32, device=device)
    scores = part if gathered is None else torch.empty((heads, slots), dtype=torch.float32, device=device)
    out = torch.empty_like(q)
    blocks = {"SPLITS": splits, "BLOCK_G": block_g, "BLOCK_D": block_d}
    launch(
        _attend_kernel,
        (kv_heads, splits, 1),
        (q, key, value, step, part, largest, total, scores, start, slots, scale, key.stride(0)),
        {"GROUPS": groups, "D": width, "KEEPS_SCORES": gathered is not None, **blocks, "BLOCK_N": block_n},
        stages=2,
    )
    blocks = {"SPLITS": splits, "BLOCK_SPLITS": power_of_two(splits), "BLOCK_G": block_g}
    launch(
        _join_kernel,
        (heads, 1, 1),
        (part, largest, total, out),
        {"GROUPS": groups, "D": width, **blocks, "BLOCK_D": block_d},
    )
    if gathered is not None:
        launch(
            _gather_kernel,
            (kv_heads, ceil_div(slots, 128), 1),
            (scores, largest, total, step, gathered, start, slots),
            {"GROUPS": groups, **blocks, "BLOCK_N": 128},
        )
    return out


def _choose_splits(kv_heads: int, slots: int, block_n: int, device: torch.device) -> int:
    """Parts so that one program meets on every multiprocessor, none shorter than a block."""
    wanted = ceil_div(multiprocessor_count(device.index or 0), kv_heads)
    return max(1, min(wanted, ceil_div(slots, block_n), _MOST_SPLITS))
