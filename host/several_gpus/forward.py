"""One forward of ComfyUI's own model on a part of its tokens, its attention reached as ComfyUI lets one override it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...attention.split_forward import SplitForward
from .split_families import CoreFamily

OVERRIDE = "optimized_attention_override"
_POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""What ComfyUI's attention functions take behind q, k and v."""


class NotSplitError(Exception):
    """This process has no part in the forward, which the first process makes alone; the message says why."""


class CoreForward(SplitForward):
    """As `SplitForward`; where a forward cannot be split the first process goes on alone."""

    _family: CoreFamily

    def run(self, forward: Callable[[], Any]) -> Any:
        """`forward()` with this process's part of the tokens; its result is right at the first process alone.

        Raises:
            NotSplitError: at the others, where the first one goes on alone.
        """
        with self.hooks():
            return forward()

    def _left_whole(self, reason: str) -> None:
        if self._rank:
            raise NotSplitError(reason)

    def _frames(self, named: Mapping[str, Any], length: int) -> int | None:
        options = named.get("transformer_options") or {}
        if not any(name in options for name in self._family.by_frame):
            return None
        return options["grid_sizes"][0] if math.prod(options["grid_sizes"]) == length else 0

    def _adapted(self, named: dict[str, Any]) -> dict[str, Any]:
        """With the options as patches in a block are to see them: this process's frames."""
        options = named.get("transformer_options") or {}
        by_frame = {name: dim for name, dim in self._family.by_frame.items() if name in options}
        if not by_frame:
            return named
        first, last = (token // self._unit for token in self._range(self._family.main))
        own = {name: options[name].narrow(dim, first, last - first) for name, dim in by_frame.items()}
        grid = (last - first, *options["grid_sizes"][1:])
        return named | {"transformer_options": {**options, **own, "grid_sizes": grid}}

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
