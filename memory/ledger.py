"""The ledger: what was in memory at each step and phase of a run, the peaks, and what each release really freed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .components import OTHER
from .devices import Device, Reading, resident_bytes

BUDGET = 0.004
"""Part of the steps' time that may go into measuring them; past it steps are not measured until it is made up for."""

ALLOWANCE = 0.005
"""Seconds of measuring that a run's steps may take in any case, so that a short run has a report too."""

MOST_SAMPLES = 20_000
"""A run's ledger keeps this many samples; after that every second one of the steps is dropped."""


@dataclass(frozen=True, kw_only=True)
class Sample(Reading):
    """A reading in the course of a run; its `peak` is that since the sample before.

    Attributes:
        seconds: since the run began.
        phase: what was going on: `load`, `sampling`, `decode`, or a node's class.
        node: id of the ComfyUI node at work.
        step, steps: of a sampling run; 0 and 0 elsewhere.
        host_resident, host_pinned: bytes of main memory.
        components: resident bytes by name; they add up to `allocated`.
    """

    seconds: float
    phase: str
    node: str
    step: int
    steps: int
    host_resident: int
    host_pinned: int
    components: Mapping[str, int]


@dataclass(frozen=True)
class Release:
    """One release: what was asked to go, and the bytes that the device really got back."""

    seconds: float
    node: str
    names: tuple[str, ...]
    reason: str
    freed: int


@dataclass
class Run:
    """One prompt's ledger; `nodes` has the class of each node at work, `peak` the most that was allocated at once."""

    prompt: str
    started: float
    nodes: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    stepping_seconds: float = 0.0
    measuring_seconds: float = 0.0
    measuring_steps_seconds: float = 0.0
    clearing_seconds: float = 0.0
    skipped: int = 0
    clearings: int = 0
    limit: int | None = None
    peak: int = 0

    @property
    def seconds_per_step(self) -> float | None:
        """The middle one of the last steps' times; None before the first step."""
        last = sorted(self.step_seconds[-9:])
        return last[len(last) // 2] if last else None

    def add(self, sample: Sample) -> None:
        """Writes a sample down."""
        self.samples.append(sample)
        self.peak = max(self.peak, sample.peak)


class Ledger:
    """Measures a device.

    Args:
        device: what is measured.
        components: resident bytes of each component that is known by name; must be cheap.
        pinned: bytes of pinned main memory.
        clock: seconds.
    """

    def __init__(
        self,
        device: Device,
        components: Callable[[], Mapping[str, int]],
        pinned: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device = device
        self._components = components
        self._pinned = pinned
        self._clock = clock
        self.run = Run("", clock())

    def begin(self, prompt: str) -> Run:
        """A new run; the one before is forgotten."""
        self.run = Run(prompt, self._clock())
        self.device.reset_peak()
        return self.run

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._clock() - self.run.started

    def sample(self, phase: str, node: str = "", step: int = 0, steps: int = 0) -> Sample:
        """Measures now and starts a new peak."""
        began = self._clock()
        reading = self.device.read()
        self.device.reset_peak()
        components = dict(self._components())
        components[OTHER] = max(0, reading.allocated - sum(components.values()))
        sample = Sample(
            **{**vars(reading), "peak": max(reading.peak, reading.allocated)},
            seconds=began - self.run.started,
            phase=phase,
            node=node,
            step=step,
            steps=steps,
            host_resident=resident_bytes(),
            host_pinned=self._pinned(),
            components=components,
        )
        self.run.add(sample)
        if len(self.run.samples) > MOST_SAMPLES:
            self._thin_out()
        self.run.measuring_seconds += self._clock() - began
        return sample

    def may_measure_step(self) -> bool:
        """Whether measuring one more step stays within its share of the steps' time; counts those that do not."""
        run = self.run
        within = run.measuring_steps_seconds <= ALLOWANCE + BUDGET * run.stepping_seconds
        run.skipped += not within
        return within

    def stepped(self, seconds: float, measuring: float) -> None:
        """Adds a step's time, and the time that measuring it took."""
        run = self.run
        run.step_seconds.append(seconds)
        run.stepping_seconds += seconds
        self.measured(measuring)

    def measured(self, seconds: float) -> None:
        """Adds time that went into measuring a step, or a part of one."""
        self.run.measuring_steps_seconds += seconds

    def released(self, node: str, names: tuple[str, ...], reason: str, freed: int) -> None:
        """Writes a release down."""
        self.run.releases.append(Release(self.seconds, node, names, reason, freed))

    def note(self, text: str) -> bool:
        """Writes a remark down, once a run; returns whether it is new."""
        new = text not in self.run.notes
        if new:
            self.run.notes.append(text)
        return new

    def _thin_out(self) -> None:
        """Halves the samples, keeping each pair's higher peak."""
        samples = self.run.samples
        pairs = (samples[index : index + 2] for index in range(0, len(samples), 2))
        self.run.samples = [max(pair, key=lambda sample: sample.peak) for pair in pairs]
