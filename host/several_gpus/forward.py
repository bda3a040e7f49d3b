"""One forward of ComfyUI's own model on a part of its tokens: cut before the first block, joined after the last."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...attention.sequence_split import SequenceSplit, shares
from .split_families import COARSE, PLACE, STREAM, Input, SplitFamily

OVERRIDE = "optimized_attention_override"
_POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""What ComfyUI's attention functions take behind q, k and v."""


class NotSplitError(Exception):
    """This process has no part in the forward, which the first process makes alone; the message says why."""


class SplitForward:
    """The hooks on a network for the length of one forward. Every process makes it of the same numbers.

    A forward that cannot be split is found out at its first block, by every process alike: the first one goes on
    alone, and `reason` says why.

    Args:
        network: the diffusion model.
        family: its row.
        group: the processes, one a GPU.
        speeds: how fast each is beside the others.
        pieces: see `SequenceSplit`.
    """

    def __init__(self, network: Any, family: SplitFamily, group: Any, speeds: Sequence[float], pieces: int = 1):
        self._network = network
        self._family = family
        self._group = group
        self._rank: int = group.rank()
        self._speeds = list(speeds)
        self._pieces = pieces
        self._dealt: dict[str, list[int]] = {}
        self._unit = 1
        self._split: SequenceSplit | None = None
        self._cut: dict[tuple[str, int], tuple[Any, Any]] = {}
        self.reason: str | None = None

    @property
    def size(self) -> int:
        """How many processes take part."""
        return len(self._speeds)

    def run(self, forward: Callable[[], Any]) -> Any:
        """`forward()` with this process's part of the tokens; its result is right at the first process alone.

        Raises:
            NotSplitError: at the others, where the first one goes on alone.
        """
        with self._hooks():
            return forward()

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
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
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_block(self, index: int, block: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        named = _by_name(block, args, kwargs)
        if index == 0:
            self.reason = self._deal(named)
            if self.reason is not None and self._rank:
                raise NotSplitError(self.reason)
        if self.reason is not None:
            return None
        for name, row in self._family.inputs.items():
            if named.get(name) is not None and (index == 0 or row.kind != STREAM):
                named[name] = self._part(name, row, named[name])
        options = named.get("transformer_options")
        if options is not None:
            named["transformer_options"] = self._own_frames(options)
        return (), named

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
        self._split = SequenceSplit(self._group, joint, self._speeds, self._pieces)
        return None

    def _unit_of(self, named: Mapping[str, Any], length: int) -> int | None:
        """How many tokens must stay together; None where there is no such number."""
        rows = [
            named[name].shape[row.dim]
            for name, row in self._family.inputs.items()
            if row.kind == COARSE and named[name].shape[row.dim] > 1
        ]
        options = named.get("transformer_options") or {}
        if any(name in options for name in self._family.by_frame):
            if math.prod(options["grid_sizes"]) != length:
                return None
            rows.append(options["grid_sizes"][0])
        if any(length % count for count in rows):
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

    def _own_frames(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options as patches in a block are to see them: this process's frames."""
        named = {name: dim for name, dim in self._family.by_frame.items() if name in options}
        if not named:
            return options
        first, last = (token // self._unit for token in self._range(self._family.main))
        own = {name: options[name].narrow(dim, first, last - first) for name, dim in named.items()}
        return {**options, **own, "grid_sizes": (last - first, *options["grid_sizes"][1:])}

    def _before_attention(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._split is None:
            return None
        options = kwargs["transformer_options"]
        attend = functools.partial(self._attend, options)
        return args, kwargs | {"transformer_options": options | {OVERRIDE: attend}}

    def _attend(self, options: dict[str, Any], function: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's protocol of an override: the attention below, with some of the heads and all of the tokens."""
        assert self._split is not None
        named = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
        heads, mask = named.pop("heads"), named.pop("mask", None)
        heads_first = named.pop("skip_output_reshape", False)
        if not named.pop("skip_reshape", False):
            q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
        named["transformer_options"] = options
        below = options.get(OVERRIDE)
        call = function if below is None else functools.partial(below, function)

        def attention(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            return call(q, k, v, q.shape[1], mask=mask, skip_reshape=True, **named)

        out = self._split.attend(q, k, v, attention, mask)
        return out.unflatten(-1, (heads, -1)).transpose(1, 2) if heads_first else out

    def _before_output(self, output: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._split is None or not self._family.output_inputs:
            return None
        named = _by_name(output, args, kwargs)
        for name, row in self._family.output_inputs.items():
            named[name] = self._part(f"output {name}", row, named[name])
        return (), named

    def _after_output(self, output: Any, args: tuple, own: torch.Tensor) -> torch.Tensor | None:
        if self._split is None:
            return None
        own_split = SequenceSplit(self._group, self._dealt[self._family.main])
        whole = own_split.gather(own)
        total = sum(self._dealt[self._family.main])
        return own.new_empty(own.shape[0], total, own.shape[2]) if whole is None else whole


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A module's inputs, all by the names of its forward's parameters."""
    return dict(zip(_names(type(module).forward), args, strict=False)) | kwargs
