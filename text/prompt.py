"""Runs a whole prompt through a decoder's layers at once, and fills the caches that its tokens are made from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels.gather_prompt import gather_prompt
from ..kernels.norm_rows import add_norm_reference
from .architecture import Architecture
from .caches import FULL, CachePolicy, HeavyHitterCache, LayerCache, ring_cache
from .decoder import Model, add_branch
from .layers import LayerAttention
from .reading import rotary_tables


def run_prompt(model: Model, shape: Architecture, tokens: torch.Tensor, room: int, policy: CachePolicy) -> torch.Tensor:
    """(T, V) logits after every token of a prompt (T,); the layers' caches and rotary tables are made for what follows.

    Args:
        model: from `reading.Reader`.
        shape: what it is built like.
        tokens: (T,) int64 on the model's device.
        room: tokens to come at most.
        policy: what the caches keep.
    """
    count = tokens.shape[0]
    x = model.embed(tokens)
    branch = branch_norm = None
    for index, layer in enumerate(model.layers):
        x, normed = add_norm_reference(x, branch, branch_norm, layer.before_mixer, model.eps)
        attention = layer.mixer
        assert isinstance(attention, LayerAttention)
        branch = _attend(attention, normed, shape, shape.window[index], room, policy)
        x, normed = add_norm_reference(x, branch, layer.after_mixer, layer.before_feed_forward, model.eps)
        branch, branch_norm = layer.feed_forward(normed), layer.after_feed_forward
        attention.rotation = rotary_tables(shape, shape.window[index], count, room, x.device)
    x = add_branch(x, branch, branch_norm, model.eps)
    if model.norm is not None:
        x = F.rms_norm(x, model.norm.shape, model.norm, model.eps)
    return model.logits(x)


def _attend(
    attention: LayerAttention, x: torch.Tensor, shape: Architecture, window: int | None, room: int, policy: CachePolicy
) -> torch.Tensor:
    count, width = x.shape[0], attention.head_dim
    q, k, v = (part.view(count, -1, width).transpose(0, 1) for part in attention.project(x))
    norms = attention.norms
    if norms.query is not None:
        q = F.rms_norm(q, norms.query.shape, norms.query, norms.eps)
    if norms.key is not None:
        k = F.rms_norm(k, norms.key.shape, norms.key, norms.eps)
    turn = rotary_tables(shape, window, 0, count, x.device)
    q, k = (_rotate(part, turn.cosine, turn.sine) for part in (q, k))
    mask = None
    if window is not None and count > window:
        distance = torch.arange(count, device=x.device)[:, None] - torch.arange(count, device=x.device)
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], mask, is_causal=mask is None, scale=attention.scale, enable_gqa=True
    )
    attention.cache = _fill(q, k, v, attention.scale, window, room, policy)
    return attention.output(out[0].transpose(0, 1).reshape(count, -1))[0]


def _fill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, room: int, policy: CachePolicy
) -> LayerCache:
    count = k.shape[1]
    if window is not None and window < count + room:
        return ring_cache(k, v, count, window)
    if policy.kind != FULL:
        return HeavyHitterCache(policy, k, v, gather_prompt(q, k, None, scale))
    key, value = (part.new_zeros(part.shape[0], count + room, part.shape[2]) for part in (k, v))
    key[:, :count], value[:, :count] = k, v
    return LayerCache(key, value, count)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Heads (H, T, D) turned by tables (T, D / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
