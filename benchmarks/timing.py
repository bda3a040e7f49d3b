"""Measuring on a GPU: time without launch gaps, time with them, and extra peak memory."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from lowbit.attention.measure import milliseconds_on_gpu

Call = Callable[[], object]
LEAST_CAPTURED = 20
WINDOW = 40_000
"""Microseconds that a sample of `settled` lasts at least."""


def event_times(calls: Sequence[Call], count: int) -> list[float]:
    """Microseconds between the events around each of `count` calls, going round `calls`. For kernels of 100 us and up."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (start, stop) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in events]


def settled(call: Call) -> Callable[[], list[float]]:
    """Measures the microseconds of a call over WINDOW, after calling it unmeasured for as long.

    A big kernel is limited by power, and what ran before it would decide its clock; many calls between two events drown theirs.
    """
    call()
    count = max(1, int(WINDOW / max(1e3 * milliseconds_on_gpu(call, 2), 1)))

    def measure() -> list[float]:
        milliseconds_on_gpu(call, count)
        return [1e3 * milliseconds_on_gpu(call, count)]

    return measure


def capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of whole rounds of `calls`, at least LEAST_CAPTURED of them, and their number."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    count = len(calls) * -(-LEAST_CAPTURED // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return graph, count


def replay_times(graph: torch.cuda.CUDAGraph, count: int, replays: int) -> list[float]:
    """Microseconds per call in each of `replays` of a graph of `count` calls."""
    return [time_ / count for time_ in event_times([graph.replay], replays)]


def interleaved(contenders: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Median of each contender's times over `rounds` rounds, each in another order: nobody always follows the hottest."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            times[name] += contenders[name]()
    return {name: statistics.median(values) for name, values in times.items()}


def extra_peak(call: Call) -> int:
    """Bytes that one warm call adds to the allocated memory at its peak, its output among them."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
