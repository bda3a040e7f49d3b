"""Times GPU calls against each other: shuffled rounds, medians, enough calls between two events to drown the clock."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch

WINDOW_MS = 40.0


def _batch_ms(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def interleaved_ms(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds per call of each.

    Rounds in random order, so that a warming GPU hurts all alike. Before each sample of at least WINDOW_MS the same call
    runs unmeasured for as long again: a big kernel is limited by power, and what ran before it would decide its clock.
    """
    shuffler = random.Random(0)
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(WINDOW_MS / max(_batch_ms(call, 2), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in shuffler.sample(list(calls), len(calls)):
            _batch_ms(calls[name], counts[name])
            samples[name].append(_batch_ms(calls[name], counts[name]))
    return {name: statistics.median(values) for name, values in samples.items()}
