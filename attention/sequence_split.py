"""Attention over a sequence of which each process holds a part: tokens are exchanged for heads before it, and back after (Ulysses)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as distributed

from ..kernels.quantize_rows import quantize_rows, quantize_rows_reference
from ..kernels.runtime import kernels_run_on

# (query, key, value, mask), heads in front, -> (batch, length, heads * head_dim).
Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"],
    torch.Tensor,
]


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` dealt out by weight in whole numbers, as even as they get; where there is enough, nobody goes without.

    Args:
        total: how many there are to deal.
        weights: positive numbers, one for each part.
    """
    floor = 1 if total >= len(weights) else 0
    exact = [weight * (total - floor * len(weights)) / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    missing = total - floor * len(weights) - sum(parts)
    for index in sorted(range(len(parts)), key=lambda index: (parts[index] - exact[index], index))[:missing]:
        parts[index] += 1
    return [part + floor for part in parts]


@dataclass(frozen=True)
class Exchange:
    """How queries, keys and values travel between processes.

    Attributes:
        pieces: in how many pieces each process's heads travel: while one is attended to, the next is on its way. For the first
            and for the way back of the last everyone waits.
        small: bytes of all queries below which they travel whole, since pieces take the processor's time.
        eight_bits: whether keys and values travel as int8 with a scale for each token of each head: a quarter less in all.
    """

    pieces: int = 1
    small: int = 1 << 28
    eight_bits: bool = False


class SequenceSplit:
    """One way to deal a sequence to the processes of a group; every process makes it of the same numbers.

    All processes have to make the same calls in the same order. What is sent is the tensors' bytes, so that every dtype
    travels on every engine.

    Args:
        group: a process group of `torch.distributed`, or one of its backends alone.
        tokens: how many tokens each process holds, in the order of their ranks.
        speeds: how fast each process is beside the others, by which heads are dealt; None for all alike.
        exchange: how tokens travel.
    """

    def __init__(
        self,
        group: Any,
        tokens: Sequence[int],
        speeds: Sequence[float] | None = None,
        exchange: Exchange | None = None,
    ):
        self.group = group
        self.rank: int = group.rank()
        self.tokens = list(tokens)
        self.speeds = tuple(speeds or [1.0] * len(tokens))
        self.exchange = exchange or Exchange()

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention: Attention,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of this process's tokens to those of all: (batch, own tokens, heads * head_dim).

        Every process attends with a part of the heads, over the whole sequence, in the order of the ranks.

        Args:
            q, k, v: (batch, heads, own tokens, head_dim), of one shape and dtype.
            attention: what is called with some of the heads.
            mask: as `attention` takes it, the last dimension being this process's keys, one for all queries; or None.
        """
        batch, heads, length, width = q.shape
        if mask is not None:
            mask = self._on_all(mask)
        whole = q.element_size() * batch * heads * width * sum(self.tokens) < self.exchange.small
        dealt = _dealt(heads, self.speeds, 1 if whole else self.exchange.pieces)
        arriving = [self._to_heads(q, k, v, ranges) for ranges in dealt]
        returning = []
        for ranges, arrival in zip(dealt, arriving, strict=True):
            first, last = ranges[self.rank]
            arrived = _by_row(arrival.wait(), sum(self.tokens))
            query, key, value = _unpacked(arrived, q, last - first, self.exchange.eight_bits)
            out = attention(query, key, value, mask) if last > first else q.new_empty(batch, sum(self.tokens), 0)
            returning.append(self._to_tokens(out, ranges, width))
        result = q.new_empty(batch, length, heads, width)
        for ranges, arrival in zip(dealt, returning, strict=True):
            sizes = [length * batch * (last - first) * width for first, last in ranges]
            arrived = arrival.wait()
            if _alike(ranges, heads):
                parts = arrived.view(len(ranges), length, batch, -1, width).permute(0, 2, 1, 3, 4)
                _copy(_of_all(result, ranges, 2).movedim(2, 0), parts)
                continue
            for (first, last), part in zip(ranges, arrived.split(sizes), strict=True):
                _copy(result[:, :, first:last], part.view(length, batch, last - first, width).transpose(0, 1))
        return result.flatten(2)

    def gather(self, x: torch.Tensor, everywhere: bool = False) -> torch.Tensor | None:
        """The whole of (batch, own tokens, channels) at the first process and None at the others, or at each of them."""
        batch, _, channels = x.shape
        takes = [everywhere or rank == 0 for rank in range(len(self.tokens))]
        sent = [x.numel() * taken for taken in takes]
        received = [tokens * batch * channels * takes[self.rank] for tokens in self.tokens]
        whole = _Transfer(self.group, x.transpose(0, 1).reshape(-1).repeat(sum(takes)), sent, received).wait()
        return whole.view(-1, batch, channels).transpose(0, 1) if takes[self.rank] else None

    def _to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: list[tuple[int, int]]) -> _Transfer:
        """Sends each process its heads of this one's tokens; token by token, so that what arrives is one sequence."""
        whole = _parts(q, k, v, self.exchange.eight_bits)
        batch, _, length, _ = q.shape
        a_head = batch * sum(part.shape[-1] * part.element_size() for part in whole)
        sent = [a_head * length * (last - first) for first, last in ranges]
        buffer = torch.empty(sum(sent), dtype=torch.uint8, device=q.device)
        first, last = ranges[self.rank]
        if _alike(ranges, q.shape[1]):
            places = _places(_by_row(buffer, len(ranges) * length), whole, last - first)
            for part, place in zip(whole, places, strict=True):
                _copy(place.unflatten(0, (len(ranges), length)), _of_all(part, ranges, 1).permute(1, 3, 0, 2, 4))
        else:
            for (start, stop), piece in zip(ranges, buffer.split(sent), strict=True):
                for part, place in zip(whole, _places(_by_row(piece, length), whole, stop - start), strict=True):
                    _copy(place, part[:, start:stop].permute(2, 0, 1, 3))
        return _Transfer(self.group, buffer, sent, [a_head * tokens * (last - first) for tokens in self.tokens])

    def _to_tokens(self, out: torch.Tensor, ranges: list[tuple[int, int]], width: int) -> _Transfer:
        """Sends each process its tokens of this one's heads."""
        batch, _, channels = out.shape
        sent = [tokens * batch * channels for tokens in self.tokens]
        own = self.tokens[self.rank]
        received = [own * batch * (last - first) * width for first, last in ranges]
        by_token = out.new_empty(out.shape[1], batch, channels)
        _copy(by_token, out.transpose(0, 1))
        return _Transfer(self.group, by_token.view(-1), sent, received)

    def _on_all(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of all keys."""
        rows = mask.movedim(-1, 0)
        per_key = rows[0].numel() if len(rows) else mask.shape[:-1].numel()
        sent = [rows.numel()] * len(self.tokens)
        received = [tokens * per_key for tokens in self.tokens]
        whole = _Transfer(self.group, rows.reshape(-1).repeat(len(self.tokens)), sent, received).wait()
        return whole.view(-1, *rows.shape[1:]).movedim(0, -1)


@functools.cache
def _dealt(heads: int, speeds: tuple[float, ...], pieces: int) -> list[list[tuple[int, int]]]:
    """For each piece that has any the first and last head of every process."""
    counts = shares(heads, speeds)
    starts = accumulate(counts[:-1], initial=0)
    alike = [1.0] * pieces
    cuts = [list(accumulate(shares(count, alike), initial=start)) for start, count in zip(starts, counts, strict=True)]
    dealt = [[(cut[piece], cut[piece + 1]) for cut in cuts] for piece in range(pieces)]
    return [ranges for ranges in dealt if any(last > first for first, last in ranges)]


def _alike(ranges: Sequence[tuple[int, int]], heads: int) -> bool:
    """Whether every process has as many heads as the next, as far apart: one copy does for all of them."""
    (first, last), each = ranges[0], heads / len(ranges)
    return last > first and all(span == (first + n * each, last + n * each) for n, span in enumerate(ranges))


def _of_all(x: torch.Tensor, ranges: Sequence[tuple[int, int]], dim: int) -> torch.Tensor:
    """The heads of `ranges`, which are alike: the dimension of heads becomes two, processes and the heads of each."""
    return x.unflatten(dim, (len(ranges), -1)).narrow(dim + 1, ranges[0][0], ranges[0][1] - ranges[0][0])


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies 16 bytes at a time where both lie so that it can be: PyTorch moves strided tensors element by element."""
    if target.numel() and _in_sixteens(target) and _in_sixteens(source):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _in_sixteens(x: torch.Tensor) -> bool:
    per = 16 // x.element_size()
    numbers = (*x.stride()[:-1], x.storage_offset(), x.shape[-1])
    return x.stride(-1) == 1 and not x.data_ptr() % 16 and per > 0 and not any(number % per for number in numbers)


def _parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eight_bits: bool) -> list[torch.Tensor]:
    """What travels, each (batch, heads, length, any); those of the largest elements first, so that all are aligned."""
    if not eight_bits:
        return [q, k, v]
    codes, scales = zip(*(_in_eight_bits(x) for x in (k, v)), strict=True)
    return [*scales, q, *codes]


def _by_row(flat: torch.Tensor, rows: int) -> torch.Tensor:
    return flat.view(rows, flat.numel() // max(rows, 1))


def _places(rows: torch.Tensor, parts: Sequence[torch.Tensor], heads: int) -> list[torch.Tensor]:
    """Views of rows of bytes, one a token, where the parts lie in it: each (length, batch, heads, any)."""
    places, start = [], 0
    for part in parts:
        batch, _, _, width = part.shape
        end = start + batch * heads * width * part.element_size()
        shape = (len(rows), batch, heads, width)
        places.append(rows[:, start:end].view(part.dtype).view(shape) if end > start else part.new_empty(shape))
        start = end
    return places


def _unpacked(rows: torch.Tensor, like: torch.Tensor, heads: int, eight_bits: bool) -> list[torch.Tensor]:
    """Queries, keys and values of the tokens of `rows`: each (batch, heads, tokens, head_dim). like: this process's q."""
    few = like[:, :0, :0]
    empty = [few, few, few]
    if eight_bits:
        scale, code = few.new_empty(*few.shape[:3], 1, dtype=torch.float32), few.to(torch.int8)
        empty = [scale, scale, few, code, code]
    arrived = [place.permute(1, 2, 0, 3) for place in _places(rows, empty, heads)]
    if not eight_bits:
        return arrived
    *scales, q, k, v = arrived
    return [q, *(_decoded(codes, scale, like) for codes, scale in zip((k, v), scales, strict=True))]


def _in_eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (batch, heads, length, head_dim) and float32 scales (batch, heads, length, 1)."""
    rows = x.reshape(-1, x.shape[-1])
    if kernels_run_on(x) and len(rows):
        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        quantize_rows(rows, codes, scale)
    else:
        codes, scale = quantize_rows_reference(rows, torch.int8)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def _decoded(codes: torch.Tensor, scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.mul(codes, scale, out=torch.empty(codes.shape, dtype=like.dtype, device=like.device))


class _Transfer:
    """Numbers on their way from every process to every other; `sent` and `received` count them by process."""

    def __init__(self, group: Any, flat: torch.Tensor, sent: list[int], received: list[int]):
        self._flat = flat.contiguous()
        self._arrived = flat.new_empty(sum(received))
        size = flat.element_size()
        self._work = group.alltoall_base(
            self._arrived.view(torch.uint8),
            self._flat.view(torch.uint8),
            [count * size for count in received],
            [count * size for count in sent],
            distributed.AllToAllOptions(),
        )

    def wait(self) -> torch.Tensor:
        """What has arrived, in the order of the ranks; on a GPU the stream waits and not the processor."""
        self._work.wait()
        return self._arrived
