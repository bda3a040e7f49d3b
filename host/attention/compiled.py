"""One opaque torch operator around the dispatcher, so that a compiled model does not try to trace into it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ...kernels.operators import register_own_operator


class Told(NamedTuple):
    """What the operator is told beside its tensors and the handle, in its order.

    scale: None for head_dim ** -0.5. exact: by the call's own arguments. precision: `attn_precision` as core was given it.
    block: the number of the model's block, where the schedule asks for it. heads_first: the output keeps the heads in front.
    """

    scale: float | None
    exact: bool
    precision: torch.dtype | None
    block: int | None
    heads_first: bool


class RunsCompiled(Protocol):
    """What the operator calls: the attention override's own way in, with q, k, v, the mask and what was told."""

    @property
    def run_compiled(self) -> Callable[..., torch.Tensor]: ...


_handles = itertools.count()
_OVERRIDES: weakref.WeakValueDictionary[int, RunsCompiled] = weakref.WeakValueDictionary()


def register(override: RunsCompiled) -> int:
    """A number by which the operator finds the override; forgotten with it."""
    handle = next(_handles)
    _OVERRIDES[handle] = override
    return handle


def _attention(q, k, v, mask, handle, *told):
    return _OVERRIDES[handle].run_compiled(q, k, v, mask, Told(*told)).contiguous()


def _attention_shape(q, k, v, mask, handle, *told):
    batch, heads, length, _ = q.shape
    if Told(*told).heads_first:
        return q.new_empty(batch, heads, length, v.shape[-1])
    return q.new_empty(batch, length, heads * v.shape[-1])


# block is a SymInt: as an int, every block of a model compiled block by block would be compiled anew.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, int handle, float? scale, bool exact, ScalarType? precision, "
    "SymInt? block, bool heads_first) -> Tensor"
)


attention = register_own_operator("attention", _SCHEMA, _attention, _attention_shape)
