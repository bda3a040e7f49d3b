"""Measuring on a GPU: time without launch gaps, time with them, extra peak memory, and what it was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
PACKAGES = ("torch", "triton", "comfy-kitchen", "torchao", "gemlite")


def environment() -> dict[str, str]:
    """Versions, GPU, driver and date: the header of every results file."""
    found = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found["cuda"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        found["driver"] = answer[0] if answer else "unknown"
    return found


def event_times(calls: Sequence[Call], count: int) -> list[float]:
    """Microseconds between the events around each of `count` calls, going round `calls`. For kernels of 100 us and up."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (start, stop) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in events]


def capture(calls: Sequence[Call], least: int = 20) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of whole rounds of `calls`, at least `least` of them, and their number."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    count = len(calls) * -(-least // len(calls))
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


def host_time(call: Call, count: int = 50) -> float:
    """Microseconds of host time to issue one call, GPU work not awaited."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    issued = 1e6 * (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return issued


def extra_peak(call: Call) -> int:
    """Bytes that one warm call adds to the allocated memory at its peak, its output among them."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
