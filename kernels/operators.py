"""Registers an operator of this pack with torch, so that `torch.compile` takes it as one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_libraries: list[torch.library.Library] = []


def register_operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.lowbit.<name>` once per process, also when the pack is imported under two names.

    Args:
        name: the operator's.
        schema: what `torch.library.Library.define` takes; strides are kept as they are.
        run: the operator, on the CPU and on CUDA.
        fake: an empty result of the same shape, dtype and strides.
    """
    if hasattr(torch.ops.lowbit, name):
        return
    library = torch.library.Library("lowbit", "FRAGMENT")
    library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"lowbit::{name}", fake, lib=library)
    _libraries.append(library)
