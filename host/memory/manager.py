"""Installs the memory manager on clones of a model, a text encoder and a VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...memory.policies import Settings
from ..in_front import set_wrappers
from .decoding import manage_vae
from .encoding import manage_clip
from .release import manage_prompt
from .sampling import KEY, MemoryHooks


def manage(
    model: Any, clip: Any | None, vae: Any | None, settings: Settings, node_id: str | None
) -> tuple[Any, Any | None, Any | None]:
    """Managed clones; what came in stays as it is, so that nothing is left behind once the node is gone.

    Args:
        model: a ModelPatcher.
        clip: a CLIP or None.
        vae: a VAE or None.
        settings: the node's choices.
        node_id: of the manager node, for the meter.
    """
    manage_prompt(node_id, settings.limit_bytes)
    managed, hooks = model.clone(), MemoryHooks(settings, node_id)
    # A manager further up the chain gives way to this one.
    wrappers: dict[str, Callable[..., Any]] = {
        WrappersMP.OUTER_SAMPLE: hooks.outer_sample,
        WrappersMP.PREPARE_SAMPLING: hooks.prepare_sampling,
        WrappersMP.SAMPLER_SAMPLE: hooks.sampler_sample,
        WrappersMP.CALC_COND_BATCH: hooks.calc_cond_batch,
        WrappersMP.DIFFUSION_MODEL: hooks.fetcher,
    }
    set_wrappers(managed, KEY, wrappers)
    managed.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    managed.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, hooks.loaded)
    return (
        managed,
        None if clip is None else manage_clip(clip.clone(), settings, node_id),
        None if vae is None else manage_vae(vae, settings, node_id),
    )
