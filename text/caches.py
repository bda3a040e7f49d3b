"""Key-value caches of fixed size: all tokens, the newest ones in a ring, or the newest and the heavy hitters (H2O)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.evict_slot import evict_slot

FULL, HEAVY_HITTERS = "full", "heavy_hitters"


@dataclass(frozen=True)
class CachePolicy:
    """What is kept of the tokens before.

    Attributes:
        kind: `FULL`, or `HEAVY_HITTERS`: the newest tokens, and those that have gathered the most attention.
        window: newest tokens that are kept.
        heavy_hitters: tokens kept besides.
    """

    kind: str = FULL
    window: int = 252
    heavy_hitters: int = 252

    @property
    def kept(self) -> int:
        """Tokens that are left after every step; one more is attended to."""
        return self.window + self.heavy_hitters


class LayerCache:
    """Keys and values of one layer, each key head with its own slots.

    A token's slot is its position, that modulo the ring's size, or, for heavy hitters, the slot of the token that is
    given up for it. Keys carry their rotation, so slots may lie in any order.

    Attributes:
        key, value: (KV, slots, D).
        start: tokens in it before the first step.
        gathered: (KV, slots) float32 attention gathered so far, for heavy hitters only.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        self.key, self.value, self.start = key, value, start
        self.gathered: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Tokens it has room for."""
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.key.numel() * self.key.element_size()

    def slot(self, step: torch.Tensor) -> torch.Tensor:
        """(KV,) int64 slot of the token of `step`."""
        return (step + self.start).expand(self.key.shape[0])


class RingCache(LayerCache):
    """Only the newest tokens: sliding attention."""

    def slot(self, step: torch.Tensor) -> torch.Tensor:
        return ((step + self.start) % self.slots).expand(self.key.shape[0])


def ring_cache(key: torch.Tensor, value: torch.Tensor, count: int, window: int) -> RingCache:
    """The newest `window` of the first `count` tokens of (KV, at least `count`, D), each in the slot of its position."""
    newest = torch.arange(max(0, count - window), count, device=key.device)
    parts = []
    for source in (key, value):
        target = source.new_zeros(source.shape[0], window, source.shape[2])
        target[:, newest % window] = source[:, newest]
        parts.append(target)
    return RingCache(parts[0], parts[1], count)


class HeavyHitterCache(LayerCache):
    """The newest `window` tokens and the heaviest of the others, one token more than the policy keeps.

    H2O (Zhang et al. 2023): after every step the token outside the window that has gathered the least attention goes.
    Here it goes when the next token needs its slot, which is the same.
    """

    def __init__(self, policy: CachePolicy, key: torch.Tensor, value: torch.Tensor, gathered: torch.Tensor) -> None:
        """Keep of a prompt's keys and values (KV, T, D) what the policy says, by what (KV, T) each has gathered."""
        kept = choose_kept(policy, gathered)
        heads, count = kept.shape
        slots = policy.kept + 1
        super().__init__(
            key.new_zeros(heads, slots, key.shape[2]), value.new_zeros(heads, slots, value.shape[2]), count
        )
        index = kept.unsqueeze(-1).expand(-1, -1, key.shape[2])
        self.key[:, :count] = key.gather(1, index)
        self.value[:, :count] = value.gather(1, index)
        self.gathered = torch.zeros(heads, slots, dtype=torch.float32, device=key.device)
        self.gathered[:, :count] = gathered.gather(1, kept)
        # Relative to the first step: -1 is the prompt's last token.
        self._born = torch.full((heads, slots), -(1 << 40), dtype=torch.int64, device=key.device)
        self._born[:, :count] = kept - gathered.shape[1]
        self._window = policy.window

    def slot(self, step: torch.Tensor) -> torch.Tensor:
        """As of every cache; what it gives up is gone."""
        assert self.gathered is not None
        return evict_slot(self.gathered, self._born, step, self.start, self._window)


def choose_kept(policy: CachePolicy, gathered: torch.Tensor) -> torch.Tensor:
    """(KV, min(T, kept)) int64 positions, in order, that a prompt leaves in the cache: the newest and the heaviest.

    Args:
        policy: how many of each.
        gathered: (KV, T) attention gathered by every token of the prompt.
    """
    heads, count = gathered.shape
    if count <= policy.kept:
        return torch.arange(count, device=gathered.device).expand(heads, -1)
    older = gathered[:, : count - policy.window]
    heavy = older.topk(policy.heavy_hitters, dim=1).indices
    newest = torch.arange(count - policy.window, count, device=gathered.device).expand(heads, -1)
    return torch.cat([heavy.sort(dim=1).values, newest], dim=1)
