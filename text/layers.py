"""What one decoder layer does with one token: attention over its cache and a gated feed-forward, on any weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.attend_cache import attend_cache
from ..kernels.cache_heads import HeadNorms, cache_heads
from .caches import LayerCache
from .linears import Linears


@dataclass(frozen=True)
class Rotation:
    """Rotary tables, one row a generated token: cosine and sine (T, R) float32, for 2 x R columns of a head."""

    cosine: torch.Tensor
    sine: torch.Tensor


@dataclass
class LayerAttention:
    """Attention of a decoder layer.

    Attributes:
        project: query, key and value; the query alone where the layer reads another one's cache, and query and key
            where the values are the keys before their norm.
        output: the projection back.
        heads, head_dim: of the queries.
        norms: of the heads.
        rotation: tables of this kind of layer.
        scale: of the scores.
        cache: where keys and values lie.
        reads_only: it writes no keys of its own.
        gated: the query projection makes a gate too, head by head, which the output is multiplied by (Qwen3.5).
    """

    project: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    output: Linears
    heads: int
    head_dim: int
    norms: HeadNorms
    rotation: Rotation
    scale: float
    cache: LayerCache
    reads_only: bool = False
    gated: bool = False

    def __call__(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """(1, K) -> (1, K) for the token of `step`."""
        q, *rest = self.project(x)
        gate = None
        q = q.view(self.heads, -1)
        if self.gated:
            q, gate = q[:, : self.head_dim], q[:, self.head_dim :]
        cache = self.cache
        key_value: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if not self.reads_only:
            heads = [part.view(-1, self.head_dim) for part in rest]
            key_value = (heads[0], heads[-1])
            slot = cache.slot(step)
        else:
            slot = step
        q = cache_heads(
            q, *key_value, self.norms, self.rotation.cosine, self.rotation.sine, step, slot, cache.key, cache.value
        )
        out = attend_cache(q, cache.key, cache.value, step, cache.start, self.scale, cache.gathered).view(1, -1)
        if gate is not None:
            out = out * gate.reshape(1, -1).sigmoid()
        return self.output(out)[0]


@dataclass
class FeedForward:
    """down(act(gate) * up)."""

    gate_up: Linears
    down: Linears
    activation: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(1, K) -> (1, K)."""
        return self.down(self.gate_up.gated(x, self.activation))[0]


@dataclass
class Layer:
    """One decoder layer.

    Attributes:
        mixer: attention, or what stands in its place.
        feed_forward: the gated feed-forward.
        before_mixer, before_feed_forward: RMSNorm weights (K,).
        after_mixer, after_feed_forward: of the branches before they are added (Gemma), or None.
        finish: what a model does with the residual stream after the layer, or None.
    """

    mixer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    feed_forward: FeedForward
    before_mixer: torch.Tensor
    before_feed_forward: torch.Tensor
    after_mixer: torch.Tensor | None = None
    after_feed_forward: torch.Tensor | None = None
    finish: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None
