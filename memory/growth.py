"""The growth sentinel: compares the same phase of one prompt and the next, and of one window and the next."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

WARM_UP = 2
"""How many times a phase is passed before it counts: caches fill, kernels are compiled, buffers find their size."""

TOLERANCE = 0.01
"""Growth below this part of the reference is noise."""

IDLE_SLACK = 256 << 20
"""Bytes of growth that are noise among what is reserved and not used, which comes and goes by the allocator's segments."""

MOST_PHASES = 256
"""How many phases are remembered; the oldest are forgotten."""


@dataclass(frozen=True)
class Growth:
    """A phase that takes more than it did.

    Attributes:
        times: how often it was passed.
        since: the passing it is compared with: the one that first counted, or that growth was last reported at.
        nbytes: how much more it is now than at that passing.
        idle: how much of that is reserved and not used.
    """

    times: int
    since: int
    nbytes: int
    idle: int


@dataclass
class _Passed:
    times: int = 0
    counted: int = 0
    used: int = 0
    idle: int = 0


class Sentinel:
    """Remembers each phase's third passing and reports later ones that take more.

    Args:
        slack: bytes of growth in use that are noise in any case.
    """

    def __init__(self, slack: int = 16 << 20):
        self.slack = slack
        self._phases: dict[Hashable, _Passed] = {}

    def mark(self, phase: Hashable, used: int, idle: int = 0) -> Growth | None:
        """Notes that `phase` was passed.

        Args:
            phase: anything that is equal when the same is to be expected: model, shapes, place in the run.
            used: bytes that are neither a known model's weights nor idle.
            idle: bytes that are reserved and not used.

        Returns:
            What grew, once for each further slack; None while all is well.
        """
        passed = self._phases.pop(phase, None) or _Passed()
        self._phases[phase] = passed
        if len(self._phases) > MOST_PHASES:
            del self._phases[next(iter(self._phases))]
        passed.times += 1
        if passed.times <= WARM_UP + 1:
            passed.counted, passed.used, passed.idle = passed.times, used, idle
            return None
        before = passed.used + passed.idle
        in_use = used - passed.used > max(self.slack, TOLERANCE * passed.used)
        in_all = used + idle - before > max(self.slack if in_use else max(self.slack, IDLE_SLACK), TOLERANCE * before)
        if not in_all:
            return None
        growth = Growth(passed.times, passed.counted, used + idle - before, max(0, idle - passed.idle))
        passed.counted, passed.used, passed.idle = passed.times, used, idle
        return growth

    def is_reference(self, phase: Hashable) -> bool:
        """Whether the last `mark` of this phase was the one that later ones are compared with."""
        passed = self._phases.get(phase)
        return passed is not None and passed.times == WARM_UP + 1
