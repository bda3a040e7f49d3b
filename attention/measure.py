"""Times backends on a graph's own tensors: the one way in which `auto` chooses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 3
ENOUGH_MS = 500.0
"""Rounds end early past this: long calls need no third look, and the first step of a run may cost little."""
WINDOW_MS = 10.0
"""Shorter calls are timed several in a row: the GPU then does not wait for the processor, as it does not in a model."""
MOST_REPEATS = 8
FAR_BEHIND, SHORT_MS = 1.5, 1.0
"""A call of no less than a millisecond that took so many times the fastest's time, at two looks, is not timed again."""


def milliseconds(
    calls: Mapping[str, Callable[[], torch.Tensor]], device: torch.device, shares: Mapping[str, float] | None = None
) -> tuple[dict[str, float], dict[str, Exception]]:
    """The least time of each call, and what those raised that cannot be timed. Waits for the GPU.

    The least, since whatever disturbs a call, such as a busy processor that launches late, only makes it longer.

    shares: which part of the work a call does, where that is not all; its time is that of all.

    A first round warms up, so that nothing is compiled while it is timed, and a second says how many calls a time is
    taken over; the others are interleaved, so that a warming GPU hurts all alike. Two looks at least, so that no single one
    decides: a host that stalls while kernels are launched makes it longer by as much. A call that
    raises, in whichever round, has no time.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Exception] = {}
    repeats = dict.fromkeys(calls, 1)
    remaining = list(calls)
    seen: dict[str, float] = {}
    spent = 0.0
    for number in range(-2, ROUNDS):
        for name in list(remaining):
            if name in failed:
                continue
            try:
                taken = _once(calls[name], device, repeats[name])
            except Exception as error:
                failed[name] = error
                continue
            part = (shares or {}).get(name, 1.0)
            if number >= -1:
                seen[name] = min(taken / part, seen.get(name, taken / part))
            if number == -1:
                repeats[name] = min(max(round(WINDOW_MS / max(taken, 1e-3)), 1), MOST_REPEATS)
            if number >= 0 or (number == -1 and repeats[name] == 1):
                spent += taken * repeats[name]
                samples[name].append(taken / part)
        if number < 0:
            continue
        if spent > ENOUGH_MS:
            break
        most = max(FAR_BEHIND * min(seen.values(), default=0.0), SHORT_MS)
        remaining = [name for name in remaining if not samples[name] or seen[name] <= most]
    return {name: min(samples[name]) for name in calls if name not in failed}, failed


def _once(call: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> float:
    """Milliseconds of one of `repeats` calls in a row.

    On a GPU as many run before them: power limits its clock, and what ran before, or nothing, would decide it.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats
    for _ in range(repeats if repeats > 1 else 0):
        call()
    return milliseconds_on_gpu(call, repeats)


def milliseconds_on_gpu(call: Callable[[], object], repeats: int) -> float:
    """Of one of `repeats` calls in a row, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats
