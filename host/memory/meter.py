"""Tells the browser what memory is doing while a graph runs: an event for the live meter, and a line on the node."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ...memory.components import COMPONENTS, GIB
from ...memory.ledger import Run, Sample
from ..server import prompt_server

EVENT = "lowbit.memory"
MOST_A_SECOND = 4
LAST = ("sampled", "encoded", "decoded")
"""Phases that a node's meter may stand at when the run is over: without them it would still say "sampling 19/20"."""


class Meter:
    """Sends at most `MOST_A_SECOND` events and the `LAST` ones, and only while the client that queued the prompt listens."""

    def __init__(self, server: Callable[[], Any] | None = None, clock: Callable[[], float] = time.monotonic):
        self._server = server or prompt_server
        self._clock = clock
        self._sent = -1.0

    def send(self, sample: Sample, run: Run, node_id: str | None, device: str, limit: int | None) -> None:
        """Reports a sample, unless nobody listens or the last one is too near."""
        server = self._server()
        listener = getattr(server, "client_id", None)
        now = self._clock()
        if node_id is None or listener is None or listener not in server.sockets:
            return
        if self._sent >= 0 and now - self._sent < 1 / MOST_A_SECOND and sample.phase not in LAST:
            return
        self._sent = now
        server.send_sync(EVENT, payload(sample, run, node_id, device, limit), listener)
        server.send_progress_text(line(sample, run, limit), node_id, listener)


def payload(sample: Sample, run: Run, node_id: str, device: str, limit: int | None) -> dict[str, Any]:
    """The event's data."""
    return {
        "node_id": node_id,
        "prompt_id": run.prompt,
        "phase": sample.phase,
        "step": sample.step,
        "steps": sample.steps,
        "seconds_per_step": run.seconds_per_step,
        "limit_bytes": limit,
        "allocated_bytes": sample.allocated,
        "reserved_bytes": sample.reserved,
        "peak_bytes": run.peak,
        "free_bytes": sample.free,
        "device": device,
        "components": {name: int(sample.components.get(name, 0)) for name in COMPONENTS},
    }


def line(sample: Sample, run: Run, limit: int | None) -> str:
    """One line for the node."""
    step = f" {sample.step}/{sample.steps}" if sample.steps else ""
    parts = [f"{sample.phase}{step}", f"{sample.allocated / GIB:.2f} GiB now", f"{run.peak / GIB:.2f} GiB peak"]
    if limit is not None:
        parts.append(f"{limit / GIB:.2f} GiB limit")
    if run.seconds_per_step is not None:
        parts.append(f"{run.seconds_per_step:.2f} s a step")
    return ", ".join(parts)
