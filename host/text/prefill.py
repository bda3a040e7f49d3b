"""Runs a prompt through core's own forward, and takes over the caches that it fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.gather_prompt import gather_prompt
from ...text.caches import FULL, CachePolicy, HeavyHitterCache, LayerCache, ring_cache


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
                self.by_layer[index] = gather_prompt(q[0], k[0], options.get("mask"), q.shape[-1] ** -0.5)
                return attention(q, k, v, heads, **options)

            return args, {**kwargs, "optimized_attention": watched}

        return replace


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
        return ring_cache(key, value, count, window)
    if policy.kind != FULL and gathered is not None:
        return HeavyHitterCache(policy, key[:, :count], value[:, :count], gathered)
    return LayerCache(key, value, count)
