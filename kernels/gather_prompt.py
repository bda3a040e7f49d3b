"""What attention every key of a prompt gathers, by which heavy hitters are chosen: no score is written to memory."""

from __future__ import annotations

import torch

from .launch import launch
from .runtime import INTERPRETED, ceil_div, constexpr, kernels_run_on, power_of_two, tl, triton

_TILE_NBYTES, _MOST_ROWS, _WARPS, _STAGES = 16 << 10, 64, 4, 2
_MOST_SCORES = 1 << 26
"""Scores that the reference holds at once: 256 MiB."""

_NO_SCORE = constexpr(-1e30)
_INTERPRETED = constexpr(INTERPRETED)


def gather_prompt_reference(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """As `gather_prompt`, some queries at a time."""
    heads, count, width = q.shape
    groups = heads // k.shape[0]
    gathered = torch.zeros(k.shape[0], count, dtype=torch.float32, device=q.device)
    rows = max(1, _MOST_SCORES // (heads * count))
    keys = k.transpose(1, 2).unsqueeze(1)
    place = torch.arange(count, device=q.device)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        part = q[:, start:end].reshape(k.shape[0], groups, -1, width)
        scores = (part @ keys[..., :end]).float() * scale
        if mask is not None:
            scores += mask.reshape(mask.shape[-2:])[start:end, :end]
        scores.masked_fill_(place[:end] > place[start:end, None], float("-inf"))
        gathered[:, :end] += scores.softmax(dim=-1).sum(dim=(1, 2))
    return gathered


@triton.jit
def _scores(
    q_tile, k, mask, row, place, k_l, k_d, mask_q, mask_k, count, scale, WIDTH, COLUMNS: tl.constexpr, HAS_MASK
):
    """(rows, keys) of one head, as powers of two; what a query does not look at is far below all."""
    column = tl.arange(0, COLUMNS)
    where = k + place.to(tl.int64)[None, :] * k_l + column.to(tl.int64)[:, None] * k_d
    k_tile = tl.load(where, mask=(place < count)[None, :] & (column < WIDTH)[:, None], other=0.0)
    if _INTERPRETED:  # which takes bfloat16 operands for integers
        q_tile, k_tile = q_tile.to(tl.float32), k_tile.to(tl.float32)
    scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
    seen = (place[None, :] <= row[:, None]) & (row < count)[:, None]
    if HAS_MASK:
        where = mask + row.to(tl.int64)[:, None] * mask_q + place.to(tl.int64)[None, :] * mask_k
        scores += tl.load(where, mask=seen, other=0.0).to(tl.float32)
    return tl.maximum(tl.where(seen, scores * 1.4426950408889634, _NO_SCORE), _NO_SCORE)


@triton.jit
def _queries(q, row, q_l, q_d, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    where = q + row.to(tl.int64)[:, None] * q_l + column.to(tl.int64)[None, :] * q_d
    return tl.load(where, mask=(row < count)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _prompt_sums_kernel(
    q, k, mask, sums, q_h, q_l, q_d, k_h, k_l, k_d, mask_q, mask_k, group, count, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, head): log2 of the sum of each query's exponentials."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = block * M + tl.arange(0, M)
    q_tile = _queries(q + head.to(tl.int64) * q_h, row, q_l, q_d, count, WIDTH, COLUMNS)
    keys = k + (head // group).to(tl.int64) * k_h
    largest = tl.full([M], _NO_SCORE, tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, tl.minimum((block + 1) * M, count), N):
        place = start + tl.arange(0, N)
        scores = _scores(
            q_tile, keys, mask, row, place, k_l, k_d, mask_q, mask_k, count, scale, WIDTH, COLUMNS, HAS_MASK
        )
        now = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.math.exp2(largest - now) + tl.sum(tl.math.exp2(scores - now[:, None]), 1)
        largest = now
    tl.store(sums + head.to(tl.int64) * count + row, largest + tl.log2(total), mask=row < count)


@triton.jit
def _gather_prompt_kernel(
    q, k, mask, sums, gathered, q_h, q_l, q_d, k_h, k_l, k_d, mask_q, mask_k, group, count, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Program (block of keys, key head): what the queries of all heads that share it give to each."""
    block, source = tl.program_id(0), tl.program_id(1)
    place = block * N + tl.arange(0, N)
    keys = k + source.to(tl.int64) * k_h
    acc = tl.zeros([N], tl.float32)
    for member in range(0, group):
        head = (source * group + member).to(tl.int64)
        for start in range(block * N // M * M, count, M):
            row = start + tl.arange(0, M)
            q_tile = _queries(q + head * q_h, row, q_l, q_d, count, WIDTH, COLUMNS)
            scores = _scores(
                q_tile, keys, mask, row, place, k_l, k_d, mask_q, mask_k, count, scale, WIDTH, COLUMNS, HAS_MASK
            )
            total = tl.load(sums + head * count + row, mask=row < count, other=0.0)
            acc += tl.sum(tl.math.exp2(scores - total[:, None]), 0)
    tl.store(gathered + source.to(tl.int64) * count + place, acc, mask=place < count)


def gather_prompt(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(KV, T) float32: the probabilities that every key is given, over all queries and those heads that share it.

    No query looks at what comes after it.

    Args:
        q: (H, T, D), any strides.
        k: (KV, T, D), any strides.
        mask: (..., T, T) added to the scores beside that, or None.
        scale: of the scores.
    """
    if not kernels_run_on(q):
        return gather_prompt_reference(q, k, mask, scale)
    heads, count, width = q.shape
    kv_heads = k.shape[0]
    sums = torch.empty(heads, count, dtype=torch.float32, device=q.device)
    gathered = torch.empty(kv_heads, count, dtype=torch.float32, device=q.device)
    pairs = q if mask is None else mask.reshape(mask.shape[-2:])
    strides = (*q.stride(), *k.stride(), *((0, 0) if mask is None else pairs.stride()))
    sizes = (heads // kv_heads, count, scale)
    columns = max(16, power_of_two(width))
    rows = min(_MOST_ROWS, max(16, _TILE_NBYTES // (columns * q.element_size())))
    constants = {"WIDTH": width, "COLUMNS": columns, "M": rows, "N": rows, "HAS_MASK": mask is not None}
    for kernel, outputs, grid in (
        (_prompt_sums_kernel, (sums,), (ceil_div(count, rows), heads, 1)),
        (_gather_prompt_kernel, (sums, gathered), (ceil_div(count, rows), kv_heads, 1)),
    ):
        launch(kernel, grid, (q, k, pairs, *outputs, *strides, *sizes), constants, warps=_WARPS, stages=_STAGES)
    return gathered
