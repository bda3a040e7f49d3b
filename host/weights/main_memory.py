"""Refuses a load that main memory cannot hold, before it starts."""

from __future__ import annotations

import math

from ...errors import MemoryBudgetError
from ...memory.budget import host_refusal
from ...memory.devices import available_host_bytes, resident_bytes
from ...versions import find
from .preparing import Planned


def check_load(planned: Planned) -> None:
    """Raise unless main memory can hold a checkpoint as it will be stored, with every other model gone.

    With dynamic VRAM weights are read from the file as they are needed, which takes no main memory to speak of.

    Raises:
        MemoryBudgetError: it cannot; the message has the numbers and the cheapest changes.
    """
    if find("comfy.memory_management.aimdo_enabled") is not False:
        return
    nbytes = planned.plan.nbytes_after
    elements = sum(math.prod(entry.shape) for entry in planned.checkpoint.entries.values())
    # What this process holds now could be given up for it: only what is over even then is sure not to fit.
    room = available_host_bytes() + resident_bytes()
    sentence = host_refusal(planned.checkpoint.path.name, nbytes, room, 8 * nbytes / max(1, elements))
    if sentence is not None:
        raise MemoryBudgetError(sentence)
