"""Times backends on a graph's own tensors, for the `measured` choice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 3
# Rounds end early past this: a call of a second needs no median.
ENOUGH_MS = 2000.0


def milliseconds(
    calls: Mapping[str, Callable[[], torch.Tensor]], device: torch.device
) -> tuple[dict[str, float], dict[str, Exception]]:
    """Median time of each call, and what those raised that cannot be timed. Waits for the GPU.

    A first round warms up; the others are interleaved so that a warming GPU hurts all alike. A call that raises, in
    whichever round, has no time.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Exception] = {}
    spent = 0.0
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                taken = _once(call, device)
            except Exception as error:
                failed[name] = error
                continue
            if number:
                samples[name].append(taken)
                spent += taken
        if spent > ENOUGH_MS:
            break
    return {name: statistics.median(samples[name]) for name in calls if name not in failed}, failed


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
