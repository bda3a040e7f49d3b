"""A device and a clock for the tests of the memory package, with numbers that the test sets."""

from __future__ import annotations

import torch

from lowbit.memory.devices import Reading


class FakeDevice:
    """A device of `total` bytes whose counters are whatever the test wrote into them."""

    name = "fake device (host memory)"
    torch_device = torch.device("cpu")
    holds_models = True

    def __init__(self, total: int = 1000):
        self._total = total
        self.allocated, self.reserved, self.peak, self.outside = 0, 0, 0, 0
        self.cleared = 0

    def read(self) -> Reading:
        self.peak = max(self.peak, self.allocated)
        return Reading(
            self.allocated, max(self.allocated, self.reserved), self.peak, self._total - self.reserved, self.outside
        )

    def reset_peak(self) -> None:
        self.peak = 0

    def total(self) -> int:
        return self._total

    def clear(self) -> None:
        self.cleared += 1
        self.reserved = self.allocated


class Clock:
    """Seconds that pass when the test says so, and `tick` at each look."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now
