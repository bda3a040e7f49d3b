"""How long the GPU's driver lets its callers wait while memory is pinned on the same host, by a process or by a thread.

python -m benchmarks.pinning --out benchmarks/results/pinning.json [--gib 16]

ComfyUI servers beside each other pin tens of gigabytes each: a call that asks what memory is free then waits for seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import write
from benchmarks.timing import environment

SETTLE_SECONDS = 2.0


def longest_waits(calls: Mapping[str, Callable[[], Any]], until: Callable[[], bool]) -> dict[str, float]:
    """Milliseconds of each call's slowest time, all of them made in turns until `until` is true."""
    longest = dict.fromkeys(calls, 0.0)
    while not until():
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            longest[name] = max(longest[name], time.perf_counter() - started)
    return {name: 1000 * seconds for name, seconds in longest.items()}


def pin(gib: int) -> float:
    """Touches fresh memory, then seconds of pinning it."""
    memory = torch.empty(gib << 30, dtype=torch.uint8).fill_(1)
    started = time.perf_counter()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    return time.perf_counter() - started


def measure(gib: int) -> dict[str, Any]:
    """Waits in milliseconds, and seconds of pinning: alone, beside another process that pins, beside a thread that does."""
    x = torch.randn(1 << 20, device="cuda")
    calls = {"mem_get_info": torch.cuda.mem_get_info, "memory_stats": torch.cuda.memory_stats, "launch": x.neg_}
    end = time.perf_counter() + SETTLE_SECONDS
    found: dict[str, Any] = {"gib": gib, "alone": longest_waits(calls, lambda: time.perf_counter() > end)}
    command = [sys.executable, "-m", "benchmarks.pinning", "--pin", str(gib)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    waits = longest_waits(calls, lambda: process.poll() is not None)
    found["other_process"] = waits | {"pinning_seconds": float(process.communicate()[0])}
    seconds: list[float] = []
    thread = threading.Thread(target=lambda: seconds.append(pin(gib)))
    thread.start()
    waits = longest_waits(calls, lambda: not thread.is_alive())
    found["other_thread"] = waits | {"pinning_seconds": seconds[0]}
    return found


def main() -> None:
    """Measures and writes the results, or is the process that pins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pin", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pin is not None:
        torch.cuda.init()
        print(pin(options.pin))
        return
    found = {"environment": environment()} | measure(options.gib)
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


if __name__ == "__main__":
    main()
