"""One opaque torch operator around the dispatcher, so that a compiled model does not try to trace into it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch


class RunsCompiled(Protocol):
    """What the operator calls: the attention override's own way in, with the operator's arguments but the handle."""

    @property
    def run_compiled(self) -> Callable[..., torch.Tensor]: ...


_handles = itertools.count()
_OVERRIDES: weakref.WeakValueDictionary[int, RunsCompiled] = weakref.WeakValueDictionary()


def register(override: RunsCompiled) -> int:
    """A number by which the operator finds the override; forgotten with it."""
    handle = next(_handles)
    _OVERRIDES[handle] = override
    return handle


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    handle: int,
    scale: float | None,
    exact: bool,
    precision: torch.dtype | None,
    block: int | None,
    heads_first: bool,
) -> torch.Tensor:
    out = _OVERRIDES[handle].run_compiled(q, k, v, mask, scale, exact, precision, block, heads_first)
    return out.contiguous()


def _attention_shape(q, k, v, mask, handle, scale, exact, precision, block, heads_first):
    batch, heads, length, _ = q.shape
    if heads_first:
        return q.new_empty(batch, heads, length, v.shape[-1])
    return q.new_empty(batch, length, heads * v.shape[-1])


# block is a SymInt: as an int, every block of a model compiled block by block would be compiled anew.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, int handle, float? scale, bool exact, ScalarType? precision, "
    "SymInt? block, bool heads_first) -> Tensor"
)


def _define() -> torch._ops.OpOverloadPacket:
    """Registers the operator, under a second name when the pack is imported twice in one process."""
    name = next(name for name in (f"attention_{n}" for n in itertools.count(1)) if not hasattr(torch.ops.lowbit, name))
    torch.library.define(f"lowbit::{name}", _SCHEMA)
    torch.library.impl(f"lowbit::{name}", "CompositeExplicitAutograd", _attention)
    torch.library.register_fake(f"lowbit::{name}", _attention_shape)
    return getattr(torch.ops.lowbit, name)


attention = _define()
