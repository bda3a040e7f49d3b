"""A run's ledger as text, JSON and a chart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from .chart import draw
from .devices import Device
from .ledger import Run


@dataclass(frozen=True)
class Report:
    """A report in its three forms."""

    run: Run
    device: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.device}: peak {self.run.peak / 2**30:.2f} GiB"

    @property
    def data(self) -> dict[str, Any]:
        """Plain data."""
        return {"device": self.device, **asdict(self.run)}

    @cached_property
    def chart(self) -> Image.Image:
        """Memory by component over time."""
        return draw(self.run, self.device)


def make_report(run: Run, device: Device) -> Report:
    """A report on a run."""
    return Report(run, device.name)
