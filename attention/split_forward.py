"""One forward of a transformer on a part of its tokens: cut before its first block, joined after its last."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .sequence_split import Exchange, SequenceSplit, shares

STREAM, TOKENS, COARSE, PLACE = "stream", "tokens", "coarse", "place"


@dataclass(frozen=True)
class Input:
    """An input of a module that is cut; of a tuple, every tensor in it.

    Attributes:
        kind: STREAM for hidden states, cut before the first block and joined after the last; TOKENS for what goes with
            them, cut for every block; COARSE for what has a row for so many tokens, or one for all; PLACE for a number
            that counts tokens.
        streams: the streams that lie in it one after the other.
        dim: the dimension that is cut.
        ndim: how many dimensions it has where it is cut; None for any number.
    """

    kind: str
    streams: tuple[str, ...]
    dim: int = 1
    ndim: int | None = None


@dataclass(frozen=True)
class SplitFamily:
    """What of a transformer is as long as its tokens.

    Attributes:
        network: full name of the class. Only this class itself: a subclass has a forward of its own.
        blocks: its attribute with the blocks that run one after the other.
        attention: in a block, the module whose attention sees all tokens. Any other attention stays local.
        inputs: of a block, by the names of its forward's parameters.
        output: the module after the blocks whose result is joined again.
        main: the stream that `output` makes the result of.
        output_inputs: as `inputs`.
    """

    network: str
    blocks: str
    attention: str
    inputs: Mapping[str, Input]
    output: str
    main: str
    output_inputs: Mapping[str, Input] = field(default_factory=dict)


class SplitForward:
    """The hooks on a network for the length of one forward. Every process makes it of the same numbers.

    How attention is reached is its subclasses' business. A forward that cannot be split is found out at its first block,
    by every process alike; `reason` says why.

    Args:
        network: the transformer.
        family: its row.
        group: the processes, one a GPU.
        speeds: how fast each is beside the others.
        exchange: how tokens travel.
        everywhere: whether the result is right at every process, or at the first one alone.
    """

    def __init__(
        self,
        network: Any,
        family: SplitFamily,
        group: Any,
        speeds: Sequence[float],
        exchange: Exchange | None = None,
        everywhere: bool = False,
    ):
        self._network = network
        self._family = family
        self._group = group
        self._rank: int = group.rank()
        self._speeds = list(speeds)
        self._exchange = exchange
        self._everywhere = everywhere
        self._dealt: dict[str, list[int]] = {}
        self._unit = 1
        self._split: SequenceSplit | None = None
        self._cut: dict[tuple[str, int], tuple[Any, Any]] = {}
        self.reason: str | None = None

    @property
    def size(self) -> int:
        """How many processes take part."""
        return len(self._speeds)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While it is open, the network's forward takes this process's part of the tokens."""
        family, network = self._family, self._network
        output = getattr(network, family.output)
        handles = [
            output.register_forward_pre_hook(self._before_output, with_kwargs=True),
            output.register_forward_hook(self._after_output),
        ]
        for index, block in enumerate(getattr(network, family.blocks)):
            before = functools.partial(self._before_block, index)
            attention = getattr(block, family.attention)
            handles += [
                block.register_forward_pre_hook(before, with_kwargs=True),
                attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
                attention.register_forward_hook(self._after_attention, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_block(self, index: int, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        named = _inputs_by_name(block, args, kwargs)
        if index == 0:
            self.reason = self._deal(named)
        if self.reason is not None:
            return self._left_whole(self.reason)
        for name, row in self._family.inputs.items():
            value = named.get(name)
            if value is None or (index and row.kind == STREAM) or (row.ndim and row.ndim != value.ndim):
                continue
            named[name] = self._part(name, row, value)
        return (), self._adapted(named)

    def _deal(self, named: Mapping[str, Any]) -> str | None:
        """How many tokens of each stream every process gets; why they cannot be dealt, or None."""
        for name, row in self._family.inputs.items():
            if row.kind == STREAM:
                length = named[name].shape[row.dim]
                unit = self._unit_of(named, length) if row.streams[0] == self._family.main else 1
                if unit is None:
                    return "its frames are not all of one size"
                if length // unit < len(self._speeds):
                    what = "tokens" if unit == 1 else "frames"
                    return f"it has fewer {what} than there are GPUs ({row.streams[0]}: {length // unit})"
                self._dealt[row.streams[0]] = [unit * count for count in shares(length // unit, self._speeds)]
                self._unit = unit if row.streams[0] == self._family.main else self._unit
        joint = [sum(counts) for counts in zip(*self._dealt.values(), strict=True)]
        self._split = SequenceSplit(self._group, joint, self._speeds, self._exchange)
        return None

    def _unit_of(self, named: Mapping[str, Any], length: int) -> int | None:
        """How many tokens must stay together; None where there is no such number."""
        rows: list[int] = [
            named[name].shape[row.dim]
            for name, row in self._family.inputs.items()
            if row.kind == COARSE and named[name].shape[row.dim] > 1
        ]
        frames = self._frames(named, length)
        if frames is not None:
            rows.append(frames)
        if not all(rows) or any(length % count for count in rows):
            return None
        unit = math.lcm(*(length // count for count in rows))
        return unit if length % unit == 0 else None

    def _range(self, stream: str) -> tuple[int, int]:
        counts = self._dealt[stream]
        first = sum(counts[: self._rank])
        return first, first + counts[self._rank]

    def _part(self, name: str, row: Input, value: Any) -> Any:
        """This process's part of an input; what is the same for every block is cut once."""
        if row.kind == PLACE:
            first, last = self._range(row.streams[0])
            return min(max(value - first, 0), last - first)
        if isinstance(value, tuple):
            return tuple(self._part(f"{name} {index}", row, item) for index, item in enumerate(value))
        if row.kind == STREAM:
            return self._slice(row, value)
        key = (name, id(value))
        if key not in self._cut:
            self._cut[key] = (value, self._slice(row, value))
        return self._cut[key][1]

    def _slice(self, row: Input, value: torch.Tensor) -> torch.Tensor:
        if row.kind == COARSE:
            total = sum(self._dealt[row.streams[0]])
            if value.shape[row.dim] == 1:
                return value
            each = total // value.shape[row.dim]
            first, last = (token // each for token in self._range(row.streams[0]))
            return value.narrow(row.dim, first, last - first)
        parts, start = [], 0
        for stream in row.streams:
            first, last = self._range(stream)
            parts.append(value.narrow(row.dim, start + first, last - first))
            start += sum(self._dealt[stream])
        return parts[0] if len(parts) == 1 else torch.cat(parts, row.dim)

    def _left_whole(self, reason: str) -> None:
        """What comes of a forward that cannot be split: this process makes it alone, unless a subclass raises."""

    def _frames(self, named: Mapping[str, Any], length: int) -> int | None:
        """How many frames the main stream has, where none may be torn; 0 where they are not all of one size."""
        return None

    def _adapted(self, named: dict[str, Any]) -> dict[str, Any]:
        """A block's inputs as a subclass wants them, besides what the row says."""
        return named

    def _before_attention(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Reaches the attention that sees all tokens."""
        raise NotImplementedError

    def _after_attention(self, attention: Any, args: tuple, out: Any) -> None:
        """Behind it; where it failed, `out` is None."""

    def _before_output(self, output: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._split is None or not self._family.output_inputs:
            return None
        named = _inputs_by_name(output, args, kwargs)
        for name, row in self._family.output_inputs.items():
            named[name] = self._part(f"output {name}", row, named[name])
        return (), named

    def _after_output(self, output: Any, args: tuple, own: torch.Tensor) -> torch.Tensor | None:
        if self._split is None:
            return None
        own_split = SequenceSplit(self._group, self._dealt[self._family.main])
        whole = own_split.gather(own, self._everywhere)
        total = sum(self._dealt[self._family.main])
        return own.new_empty(own.shape[0], total, own.shape[2]) if whole is None else whole


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _inputs_by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A module's inputs, all by the names of its forward's parameters; those of what torch.compile has wrapped."""
    module = getattr(module, "_orig_mod", module)
    return dict(zip(_names(type(module).forward), args, strict=False)) | kwargs
