"""Refuses a sampling run that cannot fit on the GPU, before it starts."""

from __future__ import annotations

from typing import Any

from ...errors import MemoryBudgetError
from ...memory.budget import Demand, refusal
from ...memory.components import MODELS, TEXT_ENCODER
from .loaded_models import component_of, loaded_patchers, resident
from .release import can_leave, runs_here
from .session import session

_SURE = 0.5
"""Core's estimates of working memory are on the safe side, by up to two times: a refusal must be sure."""


def check_sampling(patcher: Any, noise_shape: Any, working: float) -> None:
    """Raise unless a run can fit with all its weights streamed and every other model off the GPU.

    Args:
        patcher: of the diffusion model.
        noise_shape: of the latent, a picture's or a video's; any other is let through.
        working: core's estimate of the working memory with one prompt at a time, in bytes.

    Raises:
        MemoryBudgetError: it cannot; the message has the numbers and the cheapest changes.
    """
    current = session()
    if not runs_here(patcher) or len(noise_shape) not in (4, 5):
        return
    reading = current.device.read()
    sentence = refusal(
        type(patcher.model).__name__,
        sampling_demand(patcher, noise_shape, working),
        current.limit.budget_at(reading),
        current.limit.nbytes is not None,
        current.limit.there(reading),
    )
    if sentence is not None:
        raise MemoryBudgetError(sentence)


def sampling_demand(patcher: Any, noise_shape: Any, working: float) -> Demand:
    """What a sampling run needs at the very least."""
    weights = list(patcher.model.parameters())
    nbytes = sum(weight.nbytes for weight in weights)
    elements = max(1, sum(weight.numel() for weight in weights))
    staying, encoder, leaving = 0, 0, 0
    for other in loaded_patchers():
        size = resident(other)
        if component_of(other.model) in MODELS and can_leave(other):
            leaving += size
        elif other.load_device == session().device.torch_device:
            staying += size
            encoder += size if component_of(other.model) == TEXT_ENCODER else 0
    ratio = int(getattr(patcher.model.latent_format, "spacial_downscale_ratio", 8))
    time_ratio = int(getattr(patcher.model.latent_format, "temporal_downscale_ratio", 4) or 4)
    shape = tuple(noise_shape)
    return Demand(
        largest_layer=max((weight.nbytes for weight in weights), default=0),
        working=int(_SURE * working),
        fixed=max(staying, session().device.read().allocated - leaving),
        text_encoder=encoder,
        bits=8 * nbytes / elements,
        width=shape[-1] * ratio,
        height=shape[-2] * ratio,
        frames=(shape[2] - 1) * time_ratio + 1 if len(shape) == 5 else 1,
    )
