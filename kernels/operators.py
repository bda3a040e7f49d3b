"""Registers an operator of this pack with torch, so that `torch.compile` takes it as one piece."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

_libraries: list[torch.library.Library] = []

# What is looked up may be elsewhere, or be another, when a CUDA graph is replayed. PyTorch 2.8 has no such tag.
_STAYS_OUT_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def register_operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.lowbit.<name>` once per process, also when the pack is imported under two names.

    Args:
        name: the operator's.
        schema: what `torch.library.Library.define` takes; strides are kept as they are.
        run: the operator, on any device.
        fake: an empty result of the same shape, dtype and strides.
    """
    if not hasattr(torch.ops.lowbit, name):
        _register(name, schema, run, fake)


def register_own_operator(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverloadPacket:
    """As `register_operator`, for one that looks things up in tables of its module: each import of the pack has its own.

    torch.compile's CUDA graphs ("cudagraphs", "reduce-overhead") leave it out.

    Args:
        schema: without a name in front.
    """
    own = next(own for own in (f"{name}_{n}" for n in itertools.count(1)) if not hasattr(torch.ops.lowbit, own))
    _register(own, own + schema, run, fake, _STAYS_OUT_OF_GRAPHS)
    return getattr(torch.ops.lowbit, own)


def _register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    library = torch.library.Library("lowbit", "FRAGMENT")
    library.define(schema, tags=(torch.Tag.needs_fixed_stride_order, *tags))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=library)
    _libraries.append(library)
