"""From a token's query, key and value rows to rotated heads: normalized, rotated, key and value written to the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .launch import launch
from .runtime import kernels_run_on, power_of_two, tl, triton


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of every head before it is rotated: weights (head_dim,) or None; `value` normalizes without a weight."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: bool = False
    eps: float = 1e-6


def rotate_heads_reference(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads (H, D): the first 2 x R columns turn by cosine and sine (R,) float32, halves paired."""
    half = cosine.shape[-1]
    first, second, rest = x[:, :half].float(), x[:, half : 2 * half].float(), x[:, 2 * half :]
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=1)
    return torch.cat([turned.to(x.dtype), rest], dim=1)


@triton.jit
def _store_rotated(
    source, target, weight_ptr, cosine_ptr, sine_ptr, eps, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head: RMSNorm with a weight (NORM), then the rotation of its first 2 x HALF columns."""
    element: tl.constexpr = target.dtype.element_ty
    lane = tl.arange(0, BLOCK_HALF)
    turning = lane < HALF
    first = tl.load(source + lane, mask=turning, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + lane, mask=turning, other=0.0).to(tl.float32)
    column = tl.arange(0, BLOCK_D)
    resting = (column >= 2 * HALF) & (column < D)
    scale = 1.0
    if NORM:
        whole = tl.load(source + column, mask=column < D, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(whole * whole, axis=0) / D + eps)
        first = first * scale * tl.load(weight_ptr + lane, mask=turning, other=0.0).to(tl.float32)
        second = second * scale * tl.load(weight_ptr + HALF + lane, mask=turning, other=0.0).to(tl.float32)
        first = first.to(element).to(tl.float32)
        second = second.to(element).to(tl.float32)
    cosine = tl.load(cosine_ptr + lane, mask=turning, other=0.0)
    sine = tl.load(sine_ptr + lane, mask=turning, other=0.0)
    tl.store(target + lane, (first * cosine - second * sine).to(element), mask=turning)
    tl.store(target + HALF + lane, (second * cosine + first * sine).to(element), mask=turning)
    if 2 * HALF < D:
        rest = tl.load(source + column, mask=resting, other=0.0).to(tl.float32)
        if NORM:
            rest = rest * scale * tl.load(weight_ptr + column, mask=resting, other=0.0).to(tl.float32)
        tl.store(target + column, rest.to(element), mask=resting)


@triton.jit
def _cache_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cosine_ptr,
    sine_ptr,
    step_ptr,
    slot_ptr,
    out_ptr,
    key_ptr,
    value_ptr,
    eps,
    stride_q,
    stride_k,
    stride_v,
    stride_table,
    stride_slot,
    stride_cache,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    V_NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program h < HEADS rotates query head h; the ones after it write a key head and its value head to the cache."""
    head = tl.program_id(0)
    row = tl.load(step_ptr).to(tl.int64) * stride_table
    cosine = cosine_ptr + row
    sine = sine_ptr + row
    if head < HEADS:
        _store_rotated(
            q_ptr + head * stride_q, out_ptr + head * D, q_weight_ptr, cosine, sine, eps, D, HALF, Q_NORM, BLOCK_HALF,
            BLOCK_D,
        )  # fmt: skip
    else:
        kv = head - HEADS
        place = kv.to(tl.int64) * stride_cache + tl.load(slot_ptr + kv * stride_slot).to(tl.int64) * D
        _store_rotated(
            k_ptr + kv * stride_k, key_ptr + place, k_weight_ptr, cosine, sine, eps, D, HALF, K_NORM, BLOCK_HALF,
            BLOCK_D,
        )  # fmt: skip
        column = tl.arange(0, BLOCK_D)
        value = tl.load(v_ptr + kv * stride_v + column, mask=column < D, other=0.0).to(tl.float32)
        if V_NORM:
            value = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps))
        tl.store(value_ptr + place + column, value.to(value_ptr.dtype.element_ty), mask=column < D)


def cache_heads(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    norms: HeadNorms,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    step: torch.Tensor,
    slot: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Normalize and rotate one token's heads, and write its keys and values to their slots of the cache.

    Args:
        q: (H, D) query heads, last stride 1.
        k, v: (KV, D) key and value heads, last stride 1; None for a layer that reads another one's cache.
        norms: what every head goes through first.
        cosine, sine: (T, R) float32 tables, 2 x R <= D, one row a generated token.
        step: one int32 or int64, which row of the tables.
        slot: (KV,) int32 or int64 of any stride, where in the cache each key head goes.
        key, value: (KV, slots, D) contiguous caches, written.

    Returns:
        (H, D) rotated query heads.
    """
    heads, width = q.shape
    if not kernels_run_on(q):
        return _cache_heads_reference(q, k, v, norms, cosine, sine, step, slot, key, value)
    out = torch.empty((heads, width), dtype=q.dtype, device=q.device)
    half = cosine.shape[1]
    launch(
        _cache_heads_kernel,
        (heads + (0 if k is None else k.shape[0]), 1, 1),
        (
            q,
            q if k is None else k,
            q if v is None else v,
            q if norms.query is None else norms.query,
            q if norms.key is None else norms.key,
            cosine,
            sine,
            step,
            slot,
            out,
            key,
            value,
            norms.eps,
            q.stride(0),
            0 if k is None else k.stride(0),
            0 if v is None else v.stride(0),
            cosine.stride(0),
            slot.stride(0),
            key.stride(0),
        ),
        {
            "HEADS": heads,
            "D": width,
            "HALF": half,
            "Q_NORM": norms.query is not None,
            "K_NORM": norms.key is not None,
            "V_NORM": norms.value,
            "BLOCK_HALF": power_of_two(half),
            "BLOCK_D": power_of_two(width),
        },
        warps=1 if width <= 128 else 2,
    )
    return out


def _cache_heads_reference(q, k, v, norms, cosine, sine, step, slot, key, value) -> torch.Tensor:
    turn = (cosine[step.long().view(1)], sine[step.long().view(1)])
    if k is not None:
        if norms.key is not None:
            k = F.rms_norm(k, norms.key.shape, norms.key, norms.eps)
        if norms.value:
            v = F.rms_norm(v, v.shape[-1:], None, norms.eps)
        kv = torch.arange(k.shape[0], device=k.device)
        key[kv, slot.long()] = rotate_heads_reference(k, *turn)
        value[kv, slot.long()] = v.to(value.dtype)
    if norms.query is not None:
        q = F.rms_norm(q, norms.query.shape, norms.query, norms.eps)
    return rotate_heads_reference(q, *turn)
