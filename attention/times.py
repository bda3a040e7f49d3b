"""How long calls take, on the processor or on a GPU, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Milliseconds of calls; those of a GPU lie in events until somebody asks."""

    milliseconds: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.milliseconds) + len(self.events)

    def take(self, call: Callable[[], torch.Tensor], on_gpu: bool) -> torch.Tensor:
        """Makes a call and takes its time, without waiting for the GPU."""
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out = call()
            end.record()
            self.events.append((start, end))
            return out
        begin = time.perf_counter()
        out = call()
        self.milliseconds.append((time.perf_counter() - begin) * 1e3)
        return out

    def resolved(self) -> list[float]:
        """The milliseconds of every call; waits for the GPU when events are pending."""
        for start, end in self.events:
            end.synchronize()
            self.milliseconds.append(start.elapsed_time(end))
        self.events.clear()
        return self.milliseconds
