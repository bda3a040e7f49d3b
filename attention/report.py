"""Counts which backend took which calls, and says so as JSON and as text."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .backends import AttentionCall

TIMED_CALLS = 3


@dataclass
class Tally:
    """The calls of one shape that one backend took. milliseconds: of the first few calls after the checked ones."""

    backend: str
    call: AttentionCall
    budget: str
    calls: int = 0
    error: float | None = None
    milliseconds: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def resolve(self) -> float | None:
        """The median time of the timed calls in milliseconds; waits for the GPU when events are pending."""
        for start, end in self.events:
            end.synchronize()
            self.milliseconds.append(start.elapsed_time(end))
        self.events.clear()
        return statistics.median(self.milliseconds) if self.milliseconds else None


@dataclass(frozen=True)
class Struck:
    """A backend that is not used for a shape any more, and why."""

    backend: str
    call: AttentionCall
    reason: str
    temporary: bool = False


@dataclass
class Report:
    """Everything one attention node has seen since `clear()`."""

    tallies: list[Tally] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    declined: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runs: int = 0
    model_calls_repeated: int = 0
    masks_dropped: int = 0

    def clear(self) -> None:
        """Forgets the counts; what was struck off stays so and stays listed."""
        for tally in self.tallies:
            tally.calls = 0
        self.runs = self.masks_dropped = self.model_calls_repeated = 0

    def note(self, text: str) -> bool:
        """Adds a remark once; returns whether it is new."""
        if text in self.notes:
            return False
        self.notes.append(text)
        return True

    def as_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The report as plain data: settings, calls, struck_off, declined, notes and counts."""
        rows: list[dict[str, Any]] = []
        for tally in sorted((tally for tally in self.tallies if tally.calls), key=lambda tally: -tally.calls):
            milliseconds = tally.resolve()
            row = asdict(tally.call) | {"dtype": str(tally.call.dtype).removeprefix("torch.")}
            rows.append(
                {"backend": tally.backend, "calls": tally.calls, "budget": tally.budget}
                | row
                | {"ms_per_call": milliseconds, "error": tally.error}
            )
        totals: dict[str, int] = {}
        for row in rows:
            totals[row["backend"]] = totals.get(row["backend"], 0) + row["calls"]
        return {
            **settings,
            "sampling_runs": self.runs,
            "calls_by_backend": totals,
            "calls": rows,
            "struck_off": [{"backend": s.backend, "shape": str(s.call), "reason": s.reason} for s in self.struck],
            "declined": [{"backend": name, "reason": why, "shapes": n} for (name, why), n in self.declined.items()],
            "masks_dropped": self.masks_dropped,
            "model_calls_repeated": self.model_calls_repeated,
            "notes": list(self.notes),
        }


def as_text(report: dict[str, Any]) -> str:
    """The report of `Report.as_dict` as a few lines a person can read."""
    head = f"{report['backend']}, error budget {report['budget']}, {report['sampling_runs']} sampling runs on {report['device']}"
    if report.get("paired"):
        head += f"; paired with the weights: {report['paired']}"
    lines = [head]
    if not report["calls"]:
        lines.append("No attention call came through this model yet.")
    for row in report["calls"]:
        kv_heads = "" if row["kv_heads"] == row["heads"] else f"/{row['kv_heads']}"
        shape = f"{row['batch']} x {row['heads']}{kv_heads} heads, {row['q_len']} x {row['kv_len']} tokens, head dim {row['head_dim']}"
        extra = [f"{row['mask']} mask"] if row["mask"] else []
        extra += ["exact"] if row["budget"] == "exact" and report["budget"] != "exact" else []
        extra += [f"{row['ms_per_call']:.3f} ms"] if row["ms_per_call"] is not None else []
        extra += [f"error {row['error']:.1e}"] if row["error"] is not None else []
        lines.append(f"{row['backend']}: {row['calls']} calls of {shape}" + "".join(f", {part}" for part in extra))
    lines += [f"struck off: {item['backend']} for {item['shape']}: {item['reason']}" for item in report["struck_off"]]
    lines += [f"not used: {item['backend']} ({item['shapes']} shapes): {item['reason']}" for item in report["declined"]]
    if report["masks_dropped"]:
        lines.append(f"{report['masks_dropped']} masks that mask nothing were dropped")
    if report["model_calls_repeated"]:
        lines.append(f"{report['model_calls_repeated']} model calls were repeated with exact attention")
    return "\n".join(lines + report["notes"])
