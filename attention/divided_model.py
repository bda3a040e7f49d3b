"""Any process of `torchrun` takes its part of every forward of a transformer, and gets the whole result; without ComfyUI."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .split_forward import STREAM, TOKENS, Input, SplitFamily, SplitForward

log = logging.getLogger("lowbit.attention")

FAMILIES: Mapping[str, SplitFamily] = MappingProxyType(
    {
        row.network: row
        for row in (
            SplitFamily(
                "diffusers.models.transformers.transformer_wan.WanTransformer3DModel",
                "blocks",
                "attn1",
                {
                    "hidden_states": Input(STREAM, ("video",)),
                    "temb": Input(TOKENS, ("video",), ndim=4),
                    "rotary_emb": Input(TOKENS, ("video",)),
                },
                # What comes behind it may have a row for each token of the whole.
                "norm_out",
                "video",
            ),
        )
    }
)
"""Full name of the network's class -> its row."""


def divide_tokens(model: torch.nn.Module, group: Any = None, speeds: Sequence[float] | None = None) -> torch.nn.Module:
    """Has every forward of `model` made by all processes of a group, each with its part of the tokens (Ulysses).

    Every process calls the model with the same inputs, and gets the result that one process would have made. Weights may
    be quantized, and the model may be patched, as long as that is the same in each.

    Args:
        model: a transformer whose class has a row in `FAMILIES`.
        group: a process group of `torch.distributed`; None for all processes.
        speeds: how fast each process is beside the others, by which tokens are dealt; None for all alike.

    Returns:
        The model itself.

    Raises:
        TypeError: the model's class has no row.
        ValueError: there is not one speed for each process.
    """
    kind = type(model)
    family = FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
    if family is None:
        known = ", ".join(name.rpartition(".")[2] for name in FAMILIES)
        raise TypeError(f"The tokens of a {kind.__qualname__} cannot be divided: only those of {known} can.")
    group = distributed.group.WORLD if group is None else group
    speeds = [1.0] * group.size() if speeds is None else list(speeds)
    if len(speeds) != group.size():
        raise ValueError(f"There are {group.size()} processes and {len(speeds)} speeds: give one for each.")
    if group.size() > 1:
        hooks = _Forwards(family, group, speeds)
        model.register_forward_pre_hook(hooks.begin)
        model.register_forward_hook(hooks.end, always_call=True)
    return model


class _Forwards:
    """The hooks around a model's forwards."""

    def __init__(self, family: SplitFamily, group: Any, speeds: Sequence[float]):
        self._family, self._group, self._speeds = family, group, speeds
        self._open = contextlib.ExitStack()
        self._said: set[str] = set()

    def begin(self, model: torch.nn.Module, args: tuple) -> None:
        """Before a forward."""
        split = _PlainForward(model, self._family, self._group, self._speeds, everywhere=True)
        self._open.callback(self._say, split)
        self._open.enter_context(split.hooks())

    def end(self, model: torch.nn.Module, args: tuple, out: Any) -> None:
        """After it, also where it failed."""
        self._open.close()

    def _say(self, split: _PlainForward) -> None:
        if split.reason is not None and split.reason not in self._said:
            self._said.add(split.reason)
            log.warning("Every process makes the whole of this forward, since %s.", split.reason)


class _PlainForward(SplitForward):
    """As `SplitForward`, with the attention of `torch.nn.functional`."""

    def _before_attention(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._split is not None:
            self._redirecting = _Redirecting(self._split)
            self._redirecting.__enter__()

    def _after_attention(self, attention: Any, args: tuple, out: Any) -> None:
        if self._split is not None:
            self._redirecting.__exit__(None, None, None)
            if out is not None and self._redirecting.calls != 1:
                raise RuntimeError(
                    f"{type(attention).__qualname__} does not attend by scaled_dot_product_attention, so that tokens "
                    "cannot be divided: choose diffusers' attention backend native."
                )


class _Redirecting(TorchFunctionMode):
    """While it is open, scaled_dot_product_attention sees the tokens of all processes, with some of the heads."""

    def __init__(self, split: Any):
        super().__init__()
        self._split = split
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.calls += 1
        return self._attend(*args, **kwargs)

    def _attend(self, query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        if attn_mask is not None or options.get("is_causal"):
            raise RuntimeError("Attention with a mask cannot be divided over several processes.")

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)

        out = self._split.attend(query, key, value, attention)
        return out.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
