"""Moves components off the GPU, keeping their pinned main memory, and measures what that freed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import comfy.model_management

from ...memory.components import MODELS, SCRATCH
from ...ops.scratch import release_scratch
from .loaded_models import component_of, loaded_patchers, resident
from .session import session, where

EVERYTHING = 1 << 50


@dataclass(frozen=True)
class Released:
    """What a release did.

    Attributes:
        names: the components that were on the device and left it.
        weights: bytes of weights that ComfyUI counts as moved.
        freed: bytes that the device got back, measured.
    """

    names: tuple[str, ...]
    weights: int
    freed: int

    @property
    def text(self) -> str:
        """One line for the node."""
        if not self.names:
            return "Nothing to release: none of it is on the GPU."
        return f"Released {', '.join(self.names)}: {self.freed / 2**20:,.0f} MiB freed"


def release(
    names: Collection[str], reason: str = "asked for", keep: Collection[Any] = (), running: bool = False
) -> Released:
    """Release every loaded model of these components.

    Args:
        names: of `memory.components`.
        reason: for the report.
        keep: patchers whose models stay.
        running: whether models leave that sample now; theirs is a run that has failed.
    """
    current = session()
    ledger, before = current.begin(), current.device.read()
    kept = {id(patcher.model) for patcher in keep}
    gone: dict[str, int] = {}
    for patcher in list(loaded_patchers()):
        name = component_of(patcher.model)
        stays = id(patcher.model) in kept or (samples_now(patcher) and not running)
        if name is not None and name in names and not stays and can_leave(patcher):
            weights = release_weights(patcher)
            if weights:
                gone[name] = gone.get(name, 0) + weights
    if SCRATCH in names:
        scratch = release_scratch()
        if scratch:
            gone[SCRATCH] = scratch
    if gone:
        comfy.model_management.soft_empty_cache()
    freed = max(0, before.reserved - current.device.read().reserved)
    released = Released(tuple(gone), sum(gone.values()), freed)
    if gone:
        ledger.released(where()[1], released.names, reason, freed)
        current.observe("release")
    return released


def manage_prompt(node_id: str | None, limit: int | None) -> None:
    """The manager node `node_id` has the prompt from here on; what is loaded beyond its limit leaves before anything else.

    Args:
        node_id: of the manager node, for the meter.
        limit: bytes of the device that the prompt may use, or None.
    """
    current = session()
    current.manage(node_id, limit)
    current.limit.keep_free(0)
    limit = current.limit.nbytes
    # PyTorch refuses every allocation past the limit, core's smallest ones too, which nothing makes room for.
    if limit is not None and current.device.read().reserved > limit:
        current.device.clear()
        if current.device.read().allocated > limit:
            release((*MODELS, SCRATCH), "more was loaded than the limit allows")


def runs_here(patcher: Any) -> bool:
    """Whether a model runs on the measured device, and that one holds models: not a text encoder that was put on the CPU."""
    device = session().device
    return device.holds_models and patcher.load_device == device.torch_device


def can_leave(patcher: Any) -> bool:
    """Whether a model lies on the measured device and has a place to go."""
    return runs_here(patcher) and (patcher.offload_device != patcher.load_device or patcher.load_device.type == "cpu")


def samples_now(patcher: Any) -> bool:
    """Whether a sampling run that is under way uses this model: it will not be loaded again before its next call."""
    return getattr(patcher.model, "current_patcher", None) is not None


def release_weights(patcher: Any, nbytes: int = EVERYTHING) -> int:
    """Move a model's weights off its device; its pinned main memory and its place in ComfyUI's list stay.

    Args:
        patcher: of the model.
        nbytes: about how much; all of it when left out.

    Returns:
        Bytes of weights that left.
    """
    before = resident(patcher)
    if not before:
        return 0
    patcher.partially_unload(patcher.offload_device, nbytes)
    return max(0, before - resident(patcher))
