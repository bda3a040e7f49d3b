"""Runs a prompt through core's own forward, and takes over the caches that it fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ...text.caches import FULL, CachePolicy, HeavyHitterCache, LayerCache, RingCache

_MOST_SCORES = 1 << 26
"""Scores of a prompt that are held at once while it is told what every token gathers: 256 MiB."""


class Gathered:
    """What every token of a prompt gathers, layer by layer: (KV, T) float32."""

    def __init__(self) -> None:
        self.by_layer: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def watch(self, layers: Any) -> Iterator[None]:
        """Look at the attention that core hands to every layer, for one forward."""
        handles = [
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True) for index, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def replace(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            attention = kwargs["optimized_attention"]

            def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **options: Any) -> torch.Tensor:
                self.by_layer[index] = gathered_by_key(q[0], k[0], options.get("mask"))
                return attention(q, k, v, heads, **options)

            return args, {**kwargs, "optimized_attention": watched}

        return replace


def gathered_by_key(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(KV, T) float32: the probabilities that every key is given, over all queries and those heads that share it.

    Args:
        q: (H, T, D).
        k: (KV, T, D).
        mask: (..., T, T) added to the scores, or None for one token.
    """
    heads, count, width = q.shape
    groups = heads // k.shape[0]
    gathered = torch.zeros(k.shape[0], k.shape[1], dtype=torch.float32, device=q.device)
    rows = max(1, _MOST_SCORES // (heads * k.shape[1]))
    keys = k.transpose(1, 2).unsqueeze(1)
    for start in range(0, count, rows):
        part = q[:, start : start + rows].reshape(k.shape[0], groups, -1, width)
        scores = (part @ keys).float() * width**-0.5
        if mask is not None:
            scores += mask.reshape(mask.shape[-2:])[start : start + rows]
        gathered += scores.softmax(dim=-1).sum(dim=(1, 2))
    return gathered


def take_cache(
    filled: Any, count: int, room: int, window: int | None, policy: CachePolicy, gathered: torch.Tensor | None
) -> LayerCache:
    """The cache of one layer after its prompt.

    Args:
        filled: core's (key, value, length), each (1, KV, at least `count`, D).
        count: tokens of the prompt.
        room: tokens that a full cache must hold.
        window: of sliding attention, or None.
        policy: what is kept.
        gathered: (KV, count) for heavy hitters.
    """
    key, value = filled[0][0], filled[1][0]
    if window is not None and window < room:
        return _ring(key, value, count, window)
    if policy.kind != FULL and gathered is not None:
        return HeavyHitterCache(policy, key[:, :count], value[:, :count], gathered)
    return LayerCache(key, value, count)


def _ring(key: torch.Tensor, value: torch.Tensor, count: int, window: int) -> RingCache:
    """The newest `window` tokens, each in the slot of its position."""
    newest = torch.arange(max(0, count - window), count, device=key.device)
    parts = []
    for source in (key, value):
        target = source.new_zeros(source.shape[0], window, source.shape[2])
        target[:, newest % window] = source[:, newest]
        parts.append(target)
    return RingCache(*parts, count)
