"""Heavy hitters (H2O): which slot of the cache a new token takes, for every key head, in one launch."""

from __future__ import annotations

import torch

from .launch import launch
from .runtime import kernels_run_on, power_of_two, tl, triton


def evict_slot_reference(
    gathered: torch.Tensor, born: torch.Tensor, step: torch.Tensor, start: int, window: int
) -> torch.Tensor:
    """`evict_slot` in plain torch."""
    slots = gathered.shape[1]
    filled = start + step
    weight = gathered.masked_fill(born > step - 1 - window, torch.inf)
    free = torch.minimum(filled, torch.full_like(filled, slots - 1))
    slot = torch.where(filled < slots, free.expand(weight.shape[0]), weight.argmin(dim=1)).unsqueeze(1)
    born.scatter_(1, slot, step.expand(slot.shape[0]).unsqueeze(1))
    gathered.scatter_(1, slot, 0.0)
    return slot.squeeze(1)


@triton.jit
def _evict_slot_kernel(
    gathered_ptr,
    born_ptr,
    step_ptr,
    slot_ptr,
    start,
    window,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a key head."""
    head = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    inside = slot < SLOTS
    step = tl.load(step_ptr)
    born = tl.load(born_ptr + head * SLOTS + slot, mask=inside, other=0)
    weight = tl.load(gathered_ptr + head * SLOTS + slot, mask=inside, other=float("inf"))
    weight = tl.where(inside & (born <= step - 1 - window), weight, float("inf"))
    chosen = tl.argmin(weight, axis=0).to(tl.int64)
    filled = start + step
    chosen = tl.where(filled < SLOTS, filled, chosen)
    tl.store(born_ptr + head * SLOTS + chosen, step)
    tl.store(gathered_ptr + head * SLOTS + chosen, 0.0)
    tl.store(slot_ptr + head, chosen)


def evict_slot(gathered: torch.Tensor, born: torch.Tensor, step: torch.Tensor, start: int, window: int) -> torch.Tensor:
    """(KV,) int64 slot of the token of `step`: a free one, or that of the lightest token outside the window.

    Args:
        gathered: (KV, slots) float32 attention that each token has gathered; the new one's becomes 0.
        born: (KV, slots) int64 step of the token in each slot; written.
        step: one int64.
        start: slots filled before step 0.
        window: newest tokens that stay, at least 1.
    """
    if not kernels_run_on(gathered):
        return evict_slot_reference(gathered, born, step, start, window)
    heads, slots = gathered.shape
    slot = torch.empty(heads, dtype=torch.int64, device=gathered.device)
    launch(
        _evict_slot_kernel,
        (heads, 1, 1),
        (gathered, born, step, slot, start, window),
        {"SLOTS": slots, "BLOCK": power_of_two(slots)},
    )
    return slot
