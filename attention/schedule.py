"""When attention must be exact: the first and last steps, a range of sigmas, chosen blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LowbitError


def parse_blocks(text: str) -> frozenset[int]:
    """Block numbers from text such as "0-2, 39". Raises LowbitError naming the part that is not a number or range."""
    blocks: set[int] = set()
    for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            raise LowbitError(f'exact_blocks: "{part}" is not a block number or a range such as 0-2.') from None
        if low > high or high > 4096:
            raise LowbitError(f'exact_blocks: the range "{part}" is empty or too long; write the lower block first.')
        blocks.update(range(low, high + 1))
    return frozenset(blocks)


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step that a model call at `sigma` belongs to by its sigma alone, 0 first.

    sigmas: the run's, falling or (FlipSigmas) rising, one more than steps. A call between two steps' sigmas is counted
    with the earlier step.
    """
    steps = max(len(sigmas) - 1, 1)
    margin = 1e-4 * max(abs(sigma), 1e-6)
    rising = len(sigmas) > 1 and sigmas[0] < sigmas[-2 if len(sigmas) > 2 else -1]
    passed = sum(1 for v in sigmas[:steps] if (v <= sigma + margin if rising else v >= sigma - margin))
    return min(max(passed - 1, 0), steps - 1)


# Samplers that call the model again at the sigmas of the steps to come, and how often within a step.
CALLS_AHEAD = {
    "sample_heun": 1,
    "sample_heunpp2": 2,
    "sample_exp_heun_2_x0": 1,
    "sample_exp_heun_2_x0_sde": 1,
}


class StepCounter:
    """Which step each model call of one sampling run belongs to: by its sigma, corrected where that is ambiguous.

    A sampler reports a step after the step's first model call. calls_ahead: see CALLS_AHEAD. churns: the sampler adds
    noise before each step (s_churn), so that a step's call is above its sigma; then the reports count.
    """

    def __init__(self, sigmas: Sequence[float], calls_ahead: int = 0, churns: bool = False):
        self.sigmas = sigmas
        self._calls_ahead = calls_ahead
        self._churns = churns
        self._reported = -1
        self._calls_since = 0

    def reported(self, step: int) -> None:
        """The sampler has reported `step`."""
        self._reported = step
        self._calls_since = 0

    def step(self, sigma: float) -> int:
        """The step of the model call that is about to be made at `sigma`."""
        ahead = self._reported + 1 + self._calls_since
        within = self._reported >= 0 and self._calls_since < self._calls_ahead and ahead < len(self.sigmas)
        self._calls_since += 1
        if within and math.isclose(sigma, self.sigmas[ahead], rel_tol=1e-4, abs_tol=1e-6):
            return self._reported
        if self._churns:
            return min(self._reported + 1, max(len(self.sigmas) - 2, 0))
        return step_of(sigma, self.sigmas)


@dataclass(frozen=True)
class Schedule:
    """Where the error budget is `exact` whatever the node says.

    first_steps, last_steps: how many. sigma_from, sigma_to: exact while sigma_to <= sigma <= sigma_from, when
    sigma_from > sigma_to. blocks: the model's block numbers.
    """

    first_steps: int = 0
    last_steps: int = 0
    sigma_from: float = 0.0
    sigma_to: float = 0.0
    blocks: frozenset[int] = frozenset()

    @property
    def needs_sigma(self) -> bool:
        """Whether the sigma of a model call has to be read at all: reading it waits for the GPU, once a model call."""
        return self.first_steps > 0 or self.last_steps > 0 or self.sigma_from > self.sigma_to

    def exact_at(self, sigma: float, counter: StepCounter) -> bool:
        """Whether the whole model call that is about to be made at this sigma is exact; counts the call."""
        step, steps = counter.step(sigma), max(len(counter.sigmas) - 1, 1)
        if self.sigma_from > self.sigma_to and self.sigma_to <= sigma <= self.sigma_from:
            return True
        if not (self.first_steps or self.last_steps) or not len(counter.sigmas):
            return False
        return step < self.first_steps or step >= steps - self.last_steps

    def exact_block(self, block: int | None) -> bool:
        """Whether this block is exact at every step."""
        return block in self.blocks
