"""Times GPU calls against each other: interleaved rounds, medians, enough calls between two events to drown the clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

MIN_MS = 4.0


def _batch_ms(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def interleaved_ms(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds per call of each, measured in turns so that a warming or throttling GPU hurts all alike."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(MIN_MS / max(_batch_ms(call, 2), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            samples[name].append(_batch_ms(calls[name], counts[name]))
    return {name: statistics.median(values) for name, values in samples.items()}
