"""Makes room for what comes next: moves other models off the GPU as the policy says, and retries after running out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import comfy.model_management

from ...errors import MemoryBudgetError
from ...memory.components import GIB, MODELS, SCRATCH
from ...memory.policies import ALWAYS, NEVER
from .loaded_models import left_to_load, loaded_patchers, resident
from .release import Released, can_leave, release, release_weights, runs_here
from .session import Session, session
from .streaming import forget_leftovers, forget_queues, forget_transfers, only_what_can_stream, release_pages

T = TypeVar("T")
_DYNAMIC_VRAM_ERRORS = ("VRAM grow failed", "Fault failed")
"""Beginnings of what comfy-aimdo raises, as a RuntimeError, when the driver has no memory for a buffer or a page."""


def release_for(when: str, patcher: Any, working: float, keep: Collection[Any] = (), what: str = "") -> Released | None:
    """Release what is not needed now, before `patcher`'s model runs.

    Args:
        when: `never`, `always`, or `under pressure`: only if it does not fit beside what is loaded.
        patcher: what is about to run.
        working: bytes it needs beside its weights.
        keep: further patchers that it runs with.
        what: its name, for the report.
    """
    # Core leaves them after an out-of-memory error in whatever prompt was the last.
    for runs in (patcher, *keep):
        forget_leftovers(runs)
    if when == NEVER or not runs_here(patcher):
        return None
    if when == ALWAYS or left_to_load(patcher) + working > session().limit.room:
        return release(MODELS, f"room for {what}", [patcher, *keep])
    return None


def reachable_room(patcher: Any) -> int:
    """Bytes there are for what `patcher`'s model is about to do: ComfyUI moves other models out of its way by itself."""
    others = [other for other in loaded_patchers() if other.model is not patcher.model and can_leave(other)]
    return session().limit.room + sum(resident(other) for other in others) - left_to_load(patcher)


def release_all_but(keep: Collection[Any], what: str, running: bool = False) -> Released:
    """After an out-of-memory error: release everything but `keep`, our scratch included, and give all idle memory back."""
    forget_queues()
    for patcher in loaded_patchers():
        forget_transfers(patcher)
    released = release((*MODELS, SCRATCH), f"out of memory in {what}", keep, running)
    session().device.clear()
    return released


def release_part(patcher: Any, nbytes: float) -> int:
    """Move part of a running model's weights to main memory, from where they stream; returns the bytes."""
    if patcher.is_dynamic():
        return release_pages(patcher, int(nbytes)) if runs_here(patcher) else 0
    if not can_leave(patcher):
        return 0
    with only_what_can_stream(patcher):
        return release_weights(patcher, int(nbytes))


def again_after_oom(call: Callable[[], T], make_room: Callable[[], str], what: str) -> T:
    """Call; on an out-of-memory error make room and call once more.

    Args:
        call: what may run out of memory; must be free of effects until it succeeds.
        make_room: lowers the demand and says how.
        what: for the message.

    Raises:
        MemoryBudgetError: it ran out of memory again.
    """
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        # Not kept, here or below: it would keep all tensors of the call alive.
        raise_other(error)
    said = make_room()
    session().say(f"Out of memory in {what}. It was done again after this: {said}.")
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        raise_other(error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    release_all_but((), what, running=True)
    raise MemoryBudgetError(give_up_text(session(), what, said, reason))


def alone_after_oom(call: Callable[[], T], patcher: Any, what: str) -> T:
    """`again_after_oom` with everything off the GPU, the model of `patcher` too, which the call loads anew."""

    def make_room() -> str:
        patcher.detach()
        release_all_but((), what)
        return "everything left the GPU"

    return again_after_oom(call, make_room, what)


def give_up_text(current: Session, what: str, said: str, error: str) -> str:
    """The sentence for a demand that room did not help."""
    budget = current.limit.budget
    return (
        f"{what} ran out of memory twice, the second time after this: {said}. It had {budget / GIB:.2f} GiB and its "
        f"peak was {current.ledger.run.peak / GIB:.2f} GiB ({error}). Make the picture smaller or shorter, choose a "
        "smaller format for the model, or the policy 'lowest'."
    )


def raise_other(error: Exception) -> None:
    """Raise an error again unless it means that GPU memory ran out."""
    if not (isinstance(error, RuntimeError) and str(error).startswith(_DYNAMIC_VRAM_ERRORS)):
        comfy.model_management.raise_non_oom(error)
