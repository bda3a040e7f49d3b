"""Before a run starts: does it fit at all, and if not, what are the three cheapest changes that would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .components import GIB, size_text

BUFFERS = 2
"""Streaming weights takes this many copies of the largest layer: one at work, one on its way."""

HOST_HEADROOM = 2 * GIB
"""Main memory that a load leaves for the system and for ComfyUI itself."""

_MOST_OFFERED = 3
_FORMATS = (("int8", 8.5), ("fp4_scaled", 4.6))


@dataclass(frozen=True)
class Demand:
    """What a sampling run needs at least, in bytes.

    Attributes:
        largest_layer: of the diffusion model, as it is stored.
        working: activations with one prompt at a time; grows with the pixels.
        fixed: what stays on the GPU beside it and cannot leave.
        text_encoder: of `fixed`, the part that a text encoder on the CPU would free.
        bits: of a stored weight.
        width, height, frames: of the picture.
    """

    largest_layer: int
    working: int
    fixed: int
    text_encoder: int
    bits: float
    width: int
    height: int
    frames: int

    @property
    def least(self) -> int:
        """The least GPU memory it can run in: everything streamed."""
        return self.working + BUFFERS * self.largest_layer + self.fixed


@dataclass(frozen=True)
class Change:
    """One thing a user can do, and the GPU memory the run would need at least after it."""

    text: str
    least: int


_Apply = Callable[[Demand, int], "tuple[str, Demand] | None"]
"""Makes of a demand and a budget what to do and the demand after it; None where it is of no use."""


def useful_changes(demand: Demand, budget: int) -> list[Change]:
    """Changes that make a demand fit a budget, the cheapest first; after them those that only help."""
    applied = filter(None, (apply(demand, budget) for apply in _OPTIONS))
    changes = [Change(text, changed.least) for text, changed in applied if changed.least < demand.least]
    changes.sort(key=lambda change: change.least > budget)
    return changes


def refusal(what: str, demand: Demand, budget: int, limited: bool, card: int | None = None) -> str | None:
    """The sentence that refuses a run before it starts; None when it fits.

    Args:
        what: the model, for the sentence.
        demand: what it needs.
        budget: what it may take.
        limited: whether the budget is the node's limit and not the card.
        card: what it might take without the limit; None if that is not known.
    """
    if demand.least <= budget:
        return None
    changes = useful_changes(demand, budget)
    if limited and (card is None or demand.least <= card):
        changes = [Change(f"raise vram_limit_gib to {math.ceil(demand.least / GIB * 4) / 4:g}", 0), *changes]
    options = "; or ".join(
        change.text if change.least <= budget else f"{change.text} (brings it to {size_text(change.least)})"
        for change in changes[:_MOST_OFFERED] or [Change("close what else uses the GPU", 0)]
    )
    there = f"the limit is {size_text(budget)}" if limited else f"the GPU has {size_text(budget)} for it"
    return (
        f"{what} at {demand.width}x{demand.height}{_frames(demand)} needs at least {size_text(demand.least)} of GPU memory "
        f"({size_text(demand.working)} to work in, {size_text(BUFFERS * demand.largest_layer)} to stream weights through, "
        f"{size_text(demand.fixed)} that cannot leave) and {there}: {options}."
    )


def host_refusal(name: str, needed: int, available: int, bits: float) -> str | None:
    """The sentence that refuses a load for which main memory is too small; None when it fits.

    Args:
        name: of the file.
        needed: bytes of main memory that loading takes.
        available: bytes that can be taken.
        bits: of a stored weight now.
    """
    if needed + HOST_HEADROOM <= available:
        return None
    changes = [
        f"choose the format {name_of_format} ({size_text(needed * smaller_bits / bits)})"
        for name_of_format, smaller_bits in _FORMATS
        if smaller_bits < bits
    ]
    changes.append("start ComfyUI with dynamic VRAM, which reads weights from the file as they are needed")
    changes.append(
        f"free {size_text(needed + HOST_HEADROOM - available)} by closing other programs or unloading models"
    )
    return (
        f"Loading {name} takes {size_text(needed)} of main memory and {size_text(available)} are left, "
        f"of which {size_text(HOST_HEADROOM)} stay free: {'; or '.join(changes[:_MOST_OFFERED])}."
    )


def _text_encoder_to_cpu(demand: Demand, budget: int) -> tuple[str, Demand] | None:
    if not demand.text_encoder:
        return None
    return (
        "keep the text encoder on the CPU (device in Load Text Encoder (Lowbit))",
        replace(demand, fixed=demand.fixed - demand.text_encoder, text_encoder=0),
    )


def _format(name: str, bits: float) -> _Apply:
    def apply(demand: Demand, budget: int) -> tuple[str, Demand] | None:
        if demand.bits <= bits:
            return None
        layer = int(demand.largest_layer * bits / demand.bits)
        return f"load the model in the format {name}", replace(demand, largest_layer=layer, bits=bits)

    return apply


def _resolution(demand: Demand, budget: int) -> tuple[str, Demand] | None:
    room = budget - (demand.least - demand.working)
    if room <= 0:
        return None
    scale = math.sqrt(min(1.0, room / demand.working))
    width, height = (int(side * scale) // 16 * 16 for side in (demand.width, demand.height))
    if min(width, height) < 64:
        return None
    working = int(demand.working * width * height / (demand.width * demand.height))
    return f"make it {width}x{height}", replace(demand, working=working, width=width, height=height)


def _fewer_frames(demand: Demand, budget: int) -> tuple[str, Demand] | None:
    room = budget - (demand.least - demand.working)
    if demand.frames < 2 or room <= 0:
        return None
    # Video models take frames in fours and one.
    frames = int(demand.frames * min(1.0, room / demand.working) - 1) // 4 * 4 + 1
    if frames < 5 or frames >= demand.frames:
        return None
    working = int(demand.working * frames / demand.frames)
    return f"make {frames} frames", replace(demand, working=working, frames=frames)


_OPTIONS: tuple[_Apply, ...] = (
    _text_encoder_to_cpu,
    _format(*_FORMATS[0]),
    _format(*_FORMATS[1]),
    _fewer_frames,
    _resolution,
)
"""Kinds of changes, the one that costs the user least first."""


def _frames(demand: Demand) -> str:
    return f", {demand.frames} frames," if demand.frames > 1 else ""
