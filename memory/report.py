"""A run's ledger as text, as JSON and as a chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from .chart import draw
from .components import COMPONENTS, size_text
from .ledger import Run, Sample


@dataclass(frozen=True)
class RunReport:
    """A report on a run, in its three forms. `device`: its name, and `total` its bytes of memory."""

    run: Run
    device: str
    total: int

    @cached_property
    def text(self) -> str:
        """For people, some 20 lines."""
        run = self.run
        if not run.samples:
            return "Nothing was measured: put a Memory Manager (Lowbit) in front of the sampler."
        lines = [_headline(self), _peak_line(run), _time_line(run), _host_line(run), ""]
        lines += _table("component", "at most", "at the end", _component_rows(run))
        lines += ["", *_table("node", "peak", "", _node_rows(run))]
        if run.releases:
            lines += ["", "releases"]
            lines += [
                f"  {release.seconds:7.1f} s  {', '.join(release.names)}: {size_text(release.freed)} freed ({release.reason})"
                for release in run.releases
            ]
        if run.notes:
            lines += ["", "remarks", *(f"  {note}" for note in run.notes)]
        return "\n".join(lines)

    @cached_property
    def data(self) -> dict[str, Any]:
        """Plain data, all sizes in bytes and all times in seconds."""
        run = self.run
        return {
            "device": self.device,
            "total_bytes": self.total,
            "limit_bytes": run.limit,
            "peak_bytes": run.peak,
            "host_resident_peak_bytes": _most(run, lambda sample: sample.host_resident),
            "seconds": run.samples[-1].seconds if run.samples else 0.0,
            "step_seconds": run.step_seconds,
            "seconds_per_step": run.seconds_per_step,
            "stepping_seconds": run.stepping_seconds,
            "measuring_seconds": run.measuring_seconds,
            "measuring_steps_seconds": run.measuring_steps_seconds,
            "clearing_seconds": run.clearing_seconds,
            "steps_skipped": run.skipped,
            "clearings": run.clearings,
            "nodes": [
                {"id": node, "class": run.nodes.get(node, ""), "peak_bytes": peak}
                for node, peak in _node_peaks(run).items()
            ],
            "releases": [asdict(release) for release in run.releases],
            "notes": run.notes,
            "samples": [asdict(sample) for sample in run.samples],
        }

    @cached_property
    def chart(self) -> Image.Image:
        """Memory by component over time."""
        return draw(self.run, self.device)


def _headline(report: RunReport) -> str:
    limit = "no limit" if report.run.limit is None else f"limit {size_text(report.run.limit)}"
    return f"{report.device}, {size_text(report.total)} in all, {limit}"


def _peak_line(run: Run) -> str:
    top = max(run.samples, key=lambda sample: sample.peak)
    where = f"in step {top.step} of {top.steps}" if top.steps else f"at {run.nodes.get(top.node) or top.phase}"
    line = f"Peak {size_text(top.peak)} {where}; reserved up to {size_text(_most(run, lambda sample: sample.reserved))}"
    outside = _most(run, lambda sample: sample.outside)
    line += f", {size_text(outside)} of it dynamic VRAM's pages" if outside else ""
    free = [sample.free for sample in run.samples if sample.free is not None]
    return line + (f"; at least {size_text(min(free))} free" if free else "")


def _time_line(run: Run) -> str:
    seconds = run.samples[-1].seconds
    share = 100 * run.measuring_steps_seconds / run.stepping_seconds if run.stepping_seconds else 0.0
    skipped = f" ({run.skipped} of them not measured)" if run.skipped else ""
    steps = f"; {len(run.step_seconds)} steps{skipped}, {run.seconds_per_step:.2f} s a step" if run.step_seconds else ""
    clearings = f"; {run.clearings} clearings took {run.clearing_seconds:.2f} s" if run.clearings else ""
    return f"{seconds:.1f} s{steps}, measuring took {share:.2f}% of a step{clearings}"


def _host_line(run: Run) -> str:
    resident, pinned = _most(run, lambda sample: sample.host_resident), _most(run, lambda sample: sample.host_pinned)
    return f"Main memory: up to {size_text(resident)} resident, {size_text(pinned)} of it pinned"


def _component_rows(run: Run) -> list[tuple[str, str, str]]:
    last = run.samples[-1].components
    most = {name: max(sample.components.get(name, 0) for sample in run.samples) for name in COMPONENTS}
    return [(name, size_text(most[name]), size_text(last.get(name, 0))) for name in COMPONENTS if most[name]]


def _node_rows(run: Run) -> list[tuple[str, str, str]]:
    return [
        (f"{run.nodes.get(node) or 'node'} ({node})", size_text(peak), "") for node, peak in _node_peaks(run).items()
    ]


def _node_peaks(run: Run) -> dict[str, int]:
    """A node's peak: of its samples but the first, whose peak lies before the node."""
    peaks: dict[str, int] = {}
    before = None
    for sample in run.samples:
        if sample.node:
            peak = sample.allocated if sample.node != before else sample.peak
            peaks[sample.node] = max(peaks.get(sample.node, 0), peak)
        before = sample.node
    return peaks


def _most(run: Run, value: Callable[[Sample], int]) -> int:
    return max((value(sample) for sample in run.samples), default=0)


def _table(first: str, second: str, third: str, rows: list[tuple[str, str, str]]) -> list[str]:
    width = max([len(first), *(len(row[0]) for row in rows)])
    return [f"{a:<{width}}  {b:>12}  {c:>12}".rstrip() for a, b, c in [(first, second, third), *rows]]
