"""Brings what prompts condition a model with to its GPU once a run: ComfyUI joins it on the processor at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..versions import find
from .in_front import set_wrappers

KEY = "lowbit_prompts"
_CONSTANT = find("comfy.conds.CONDConstant", ())
"""What ComfyUI does not join but compare: where it is, it is read on the processor."""
_LARGEST = 64 << 20
"""Bytes of one tensor that may stay on the GPU between steps: a text has a few MB, the latent of a first frame some tens."""


def keep_prompts_near(patcher: Any) -> None:
    """Have the texts of a patcher's runs, and other small conditions, wait where they are read.

    With many cores, joining the texts of two prompts takes 10 ms a step, in which a GPU waits.
    """
    set_wrappers(patcher, KEY, {WrappersMP.CALC_COND_BATCH: _calc_cond_batch})


def _calc_cond_batch(
    executor: Callable[..., Any], model: Any, conds: Any, x_in: torch.Tensor, timestep: Any, model_options: Any
) -> Any:
    _bring(conds, x_in.device)
    return executor(model, conds, x_in, timestep, model_options)


def _bring(conds: Iterable[Iterable[Mapping[str, Any]] | None], device: torch.device) -> None:
    """A run has conditions of its own, which ComfyUI makes of the prompts when it begins."""
    for condition in (condition for listed in conds for condition in listed or ()):
        for part in condition.get("model_conds", {}).values():
            tensor = None if isinstance(part, _CONSTANT) else getattr(part, "cond", None)
            if isinstance(tensor, torch.Tensor) and tensor.device != device and tensor.nbytes <= _LARGEST:
                part.cond = tensor.to(device)
