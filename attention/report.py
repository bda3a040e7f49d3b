"""Counts which backend took which calls, and says so as JSON and as text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..kernels.runtime import dtype_name
from .backends import AttentionCall

TIMED_CALLS = 3


@dataclass
class Times:
    """Milliseconds of calls; those of a GPU lie in events until somebody asks."""

    milliseconds: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.milliseconds) + len(self.events)

    def take(self, call: Callable[[], torch.Tensor], on_gpu: bool) -> torch.Tensor:
        """Makes a call and takes its time, without waiting for the GPU."""
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out = call()
            end.record()
            self.events.append((start, end))
            return out
        begin = time.perf_counter()
        out = call()
        self.milliseconds.append((time.perf_counter() - begin) * 1e3)
        return out

    def resolved(self) -> list[float]:
        """The milliseconds of every call; waits for the GPU when events are pending."""
        for start, end in self.events:
            end.synchronize()
            self.milliseconds.append(start.elapsed_time(end))
        self.events.clear()
        return self.milliseconds


@dataclass
class Tally:
    """The calls of one shape that one backend took.

    times: of the first few calls after the checked ones. earlier_ms: from when the shape was timed to choose, in
    this session or before it, or from an earlier prompt. error: the largest relative error seen in the calls that were compared.
    """

    backend: str
    call: AttentionCall
    budget: str
    calls: int = 0
    error: float | None = None
    earlier_ms: float | None = None
    times: Times = field(default_factory=Times)

    def resolve(self) -> float | None:
        """The median time of the timed calls in milliseconds; waits for the GPU when events are pending."""
        times = self.times.resolved()
        return statistics.median(times) if times else None


@dataclass(frozen=True)
class Struck:
    """A backend that is not used for a shape any more, and why."""

    backend: str
    call: AttentionCall
    reason: str
    temporary: bool = False


@dataclass
class Report:
    """Everything one attention node has seen since `clear()`.

    unhandled: calls that went to ComfyUI's own attention without a choice, by reason. masks_dropped: attention calls
    whose mask was left out; text_masks_dropped: model calls whose text mask was.
    """

    tallies: dict[tuple[str, AttentionCall, str], Tally] = field(default_factory=dict)
    struck: list[Struck] = field(default_factory=list)
    declined: dict[tuple[str, str], int] = field(default_factory=dict)
    unhandled: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runs: int = 0
    model_calls_repeated: int = 0
    masks_dropped: int = 0
    text_masks_dropped: int = 0

    def clear(self) -> None:
        """Forgets the counts and times; what was struck off for good stays so and stays listed."""
        for tally in self.tallies.values():
            live = tally.resolve()
            tally.earlier_ms = tally.earlier_ms if live is None else live
            tally.calls, tally.error = 0, None
            tally.times = Times()
        self.struck = [struck for struck in self.struck if not struck.temporary]
        self.unhandled.clear()
        self.runs = self.masks_dropped = self.text_masks_dropped = self.model_calls_repeated = 0

    def forget_unused(self) -> None:
        """Drops the tallies without calls, when no plan counts on them any more."""
        self.tallies = {key: tally for key, tally in self.tallies.items() if tally.calls}

    @property
    def calls(self) -> int:
        """Every attention call seen, whoever took it."""
        return sum(tally.calls for tally in self.tallies.values()) + sum(self.unhandled.values())

    def tally(self, backend: str, call: AttentionCall, budget: str) -> Tally:
        """The tally of a backend and shape, a new one where there is none."""
        return self.tallies.setdefault((backend, call, budget), Tally(backend, call, budget))

    def strike(self, struck: Struck) -> None:
        """Lists what was struck off, once."""
        if struck not in self.struck:
            self.struck.append(struck)

    def hand_on(self, reason: str) -> None:
        """Counts a call that went to ComfyUI's own attention without a choice."""
        self.unhandled[reason] = self.unhandled.get(reason, 0) + 1

    def note(self, text: str) -> None:
        """Adds a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The report as plain data: settings, calls, struck_off, declined, notes and counts. Valid JSON: no NaN."""
        rows: list[dict[str, Any]] = []
        for tally in sorted((t for t in self.tallies.values() if t.calls), key=lambda tally: -tally.calls):
            live = tally.resolve()
            rows.append(
                {"backend": tally.backend, "calls": tally.calls, "budget": tally.budget, "shape": str(tally.call)}
                | asdict(tally.call)
                | {
                    "dtype": dtype_name(tally.call.dtype),
                    "ms_per_call": tally.earlier_ms if live is None else live,
                    "ms_from": "these calls" if live is not None else None if tally.earlier_ms is None else "earlier",
                    "error": _finite(tally.error),
                }
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
            "unhandled": [{"reason": reason, "calls": calls} for reason, calls in self.unhandled.items()],
            "masks_dropped": self.masks_dropped,
            "text_masks_dropped": self.text_masks_dropped,
            "model_calls_repeated": self.model_calls_repeated,
            "notes": list(self.notes),
        }


def _finite(value: float | None) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if value is not None and math.isfinite(value) else None


def as_text(report: dict[str, Any]) -> str:
    """The report of `Report.as_dict` as a few lines a person can read."""
    runs = report["sampling_runs"]
    counted = f"{runs} sampling run{'' if runs == 1 else 's'}"
    head = f"{report['backend']}, error budget {report['budget']}, {counted} on {report['device']}"
    if report.get("paired"):
        head += f"; paired with the weights: {', '.join(report['paired'])}"
    lines = [head]
    if not report["calls"] and not report["unhandled"]:
        lines.append("No attention call came through this model yet.")
    for row in report["calls"]:
        extra = ["exact"] if row["budget"] == "exact" and report["budget"] != "exact" else []
        if row["ms_per_call"] is not None:
            extra.append(
                f"{row['ms_per_call']:.3f} ms" + (" when timed earlier" if row["ms_from"] == "earlier" else "")
            )
        extra += [f"error {row['error']:.1e}"] if row["error"] is not None else []
        lines.append(f"{row['backend']}: " + ", ".join([f"{row['calls']} calls of {row['shape']}", *extra]))
    lines += [f"struck off: {item['backend']} for {item['shape']}: {item['reason']}" for item in report["struck_off"]]
    lines += [f"not used: {item['backend']} ({item['shapes']} shapes): {item['reason']}" for item in report["declined"]]
    lines += [f"core: {item['calls']} calls as they came: {item['reason']}" for item in report["unhandled"]]
    if report["masks_dropped"]:
        lines.append(f"{report['masks_dropped']} masks that mask nothing were dropped")
    if report["text_masks_dropped"]:
        lines.append(f"a text mask that masks nothing was dropped in {report['text_masks_dropped']} model calls")
    if report["model_calls_repeated"]:
        lines.append(f"{report['model_calls_repeated']} model calls were repeated with exact attention")
    return "\n".join(lines + report["notes"])
