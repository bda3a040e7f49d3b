"""The node's work: puts the hooks that divide a sample over several GPUs on a clone of a model."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
import torch.distributed as distributed
from comfy.patcher_extension import WrappersMP

from ..errors import CapabilityError
from .in_front import set_wrappers
from .prompts import keep_prompts_near
from .several_gpus.hooks import AUTO, CFG, KEY, DividingHooks
from .several_gpus.team import Team
from .weights.folders import cache_folder

log = logging.getLogger("lowbit.several_gpus")

_TEAMS: dict[tuple[torch.device, ...], Team] = {}
"""The workers of each set of GPUs, the first of which is ComfyUI's own."""


@atexit.register
def close_all() -> None:
    """Ends every worker while Python still runs: a group that is left to its end aborts the process."""
    for team in _TEAMS.values():
        team.close()


def devices_of(gpus: str, own: torch.device) -> tuple[torch.device, ...]:
    """The GPUs to use, the model's own first.

    Args:
        gpus: auto for all that ComfyUI sees, or numbers such as "0, 1".
        own: the device the model is loaded to.

    Raises:
        CapabilityError: a number is none, or there is no such GPU.
    """
    present = [device for device in comfy.model_management.get_all_torch_devices() if device.type == "cuda"]
    if gpus.strip().lower() in ("", AUTO):
        wanted = present
    else:
        wanted = []
        for part in filter(None, (part.strip() for part in gpus.replace(";", ",").split(","))):
            device = next((device for device in present if part == str(device.index)), None)
            if device is None:
                numbers = ", ".join(str(device.index) for device in present) or "no NVIDIA GPU"
                raise CapabilityError(
                    f'gpus: there is no GPU "{part}", since ComfyUI sees {numbers}: write "auto", or numbers of those.'
                )
            wanted.append(device)
    return (own, *(device for device in dict.fromkeys(wanted) if device != own))


def divide(
    model: Any,
    devices: Sequence[torch.device],
    split: str,
    say: Callable[[str], None] = log.warning,
    eight_bits: bool = False,
) -> Any:
    """A clone of the model that samples on all of `devices`, whose workers start now; on one device, a clone that nothing is changed on.

    Args:
        model: a ModelPatcher.
        devices: the model's own first. Several of the CPU are for tests.
        split: a name of `hooks.SPLITS`; with cfg two devices are used, one for each prompt.
        say: tells the user one sentence.
        eight_bits: whether keys and values travel between devices in 8 bits.
    """
    clone = model.clone()
    devices = tuple(devices)[: 2 if split == CFG else None]
    lacking = why_not(devices)
    if lacking is not None:
        say(lacking)
        return clone
    if devices not in _TEAMS:
        _TEAMS[devices] = Team(devices, cache_folder())
    for others, team in _TEAMS.items():
        if others != devices:  # or a GPU of both would hold the model twice
            team.let_go(model.model)
    hooks = DividingHooks(_TEAMS[devices], split, say, eight_bits)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: hooks.outer_sample,
        WrappersMP.CALC_COND_BATCH: hooks.calc_cond_batch,
        WrappersMP.DIFFUSION_MODEL: hooks.diffusion_model,
    }
    set_wrappers(clone, KEY, wrappers)
    keep_prompts_near(clone)
    hooks.start(clone)
    return clone


def start_stages(devices: Sequence[torch.device]) -> dict[str, dict[str, float]]:
    """Seconds from the start of each worker of `devices` to the stages that it has reached, by its name."""
    return _TEAMS[tuple(devices)].stages()


def why_not(devices: Sequence[torch.device]) -> str | None:
    """Why a sample cannot be divided over these, or None."""
    if len(devices) < 2:
        return "Several GPUs: there is one device to sample on, so nothing is changed."
    name = "is_nccl_available" if devices[0].type == "cuda" else "is_gloo_available"
    if not distributed.is_available() or not getattr(distributed, name)():
        return "Several GPUs: this PyTorch has no NCCL for GPUs to exchange tokens with, so nothing is changed."
    return None
