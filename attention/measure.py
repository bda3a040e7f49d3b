"""Times backends on a graph's own tensors, for the `measured` choice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARMUP = 1
ROUNDS = 3


def milliseconds(calls: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Median time of each call, in interleaved rounds so that a warming GPU hurts all alike. Waits for the GPU.

    A call that raises is left out.
    """
    ready = {}
    for name, call in calls.items():
        try:
            for _ in range(WARMUP):
                call()
            ready[name] = call
        except Exception:  # the dispatcher strikes it off when it is its turn
            continue
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, call in ready.items():
            samples[name].append(_once(call, device))
    return {name: statistics.median(values) for name, values in samples.items()}


def _once(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
