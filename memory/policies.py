"""What each memory policy does: one table, one row a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

AUTO, OFF, ON, EVERY = "auto", "off", "on", "every N"

STEP_CLEARING = (AUTO, OFF, EVERY)
"""Choices for giving PyTorch's cached memory back during sampling."""

SEQUENTIAL_CFG = (AUTO, OFF, ON)
"""Choices for running the positive and the negative prompt one after the other."""

NEVER, UNDER_PRESSURE, ALWAYS = "never", "under pressure", "always"


@dataclass(frozen=True)
class MemoryPolicy:
    """One row of the table.

    Attributes:
        name: as the node shows it.
        release_before_sampling: when text encoder, VAE and audio encoder leave the GPU before the first step.
        release_before_decode: when the diffusion model leaves the GPU before the VAE decodes.
        clearing_fraction: with automatic clearing, the part of the budget that PyTorch may hold unused.
        resident_fraction: the part of the budget that weights may take; the rest streams from main memory.
        sequential: the sequential CFG that `auto` stands for.
        fetches_ahead: whether a block's streamed weights are fetched while the block before computes, into room of their own.
    """

    name: str
    release_before_sampling: str
    release_before_decode: str
    clearing_fraction: float
    resident_fraction: float
    sequential: str
    fetches_ahead: bool


_ROWS = (
    MemoryPolicy("auto", UNDER_PRESSURE, UNDER_PRESSURE, 0.25, 1.0, AUTO, True),
    MemoryPolicy("speed", NEVER, NEVER, 0.5, 1.0, OFF, True),
    MemoryPolicy("balanced", ALWAYS, ALWAYS, 0.15, 0.8, AUTO, True),
    MemoryPolicy("lowest", ALWAYS, ALWAYS, 0.05, 0.1, ON, False),
)

POLICIES: Mapping[str, MemoryPolicy] = MappingProxyType({row.name: row for row in _ROWS})
"""Policy name -> its row."""


@dataclass(frozen=True)
class Settings:
    """A manager node's choices.

    Attributes:
        policy: a name of `POLICIES`.
        step_clearing: one of `STEP_CLEARING`.
        every: with `every N`, the number of steps between two clearings.
        limit_bytes: what this graph may use of the GPU; None for all of it.
        sequential_cfg: one of `SEQUENTIAL_CFG`.
    """

    policy: str = AUTO
    step_clearing: str = AUTO
    every: int = 1
    limit_bytes: int | None = None
    sequential_cfg: str = AUTO

    @property
    def row(self) -> MemoryPolicy:
        """The policy's row of the table."""
        return POLICIES[self.policy]

    @property
    def sequential(self) -> str:
        """The sequential CFG to apply: the node's own choice, or what the policy makes of `auto`."""
        return self.row.sequential if self.sequential_cfg == AUTO else self.sequential_cfg
