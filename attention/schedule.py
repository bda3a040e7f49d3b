"""When attention must be exact: the first and last steps, a range of sigmas, chosen blocks."""

from __future__ import annotations

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
    """The step that a model call at `sigma` belongs to, 0 first. sigmas: the run's, falling, one more than steps.

    A sampler that calls the model between two steps (heun, dpm++) is counted with the step it is in.
    """
    steps = max(len(sigmas) - 1, 1)
    margin = 1e-4 * max(abs(sigma), 1e-6)
    passed = sum(1 for value in sigmas[:steps] if value >= sigma - margin)
    return min(max(passed - 1, 0), steps - 1)


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

    def exact_at(self, sigma: float, sigmas: Sequence[float]) -> bool:
        """Whether the whole model call at this sigma is exact."""
        if self.sigma_from > self.sigma_to and self.sigma_to <= sigma <= self.sigma_from:
            return True
        if not (self.first_steps or self.last_steps) or not len(sigmas):
            return False
        step, steps = step_of(sigma, sigmas), max(len(sigmas) - 1, 1)
        return step < self.first_steps or step >= steps - self.last_steps

    def exact_block(self, block: int | None) -> bool:
        """Whether this block is exact at every step."""
        return block in self.blocks
