"""Has something happen in the middle of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def in_the_middle(model: Any, act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` once, when the second block of the diffusion model in `model`, a patcher, begins.

    By a hook on every module: one on the block would keep a run on one GPU.
    """
    left = [act]
    block = model.model.diffusion_model.blocks[1]

    def begins(module: torch.nn.Module, inputs: object) -> None:
        if module is block and left:
            left.pop()()

    hook = torch.nn.modules.module.register_module_forward_pre_hook(begins)
    try:
        yield
    finally:
        hook.remove()
    assert not left, "no second block began"
