"""ComfyUI on a smaller machine, with and without the memory manager: does it finish, in what memory, how fast, does it grow.

    python -m benchmarks.memory --out benchmarks/results/memory.json [--only CASE ...] [--caps GIB ...] [--steps N]
                                [--work FOLDER] [--seconds N] [--files disk|cache]

Checkpoints have the real dimensions and random weights; they are written into --work and stay there for the next call.
Every row is written as soon as it is measured; what fails or takes longer than --seconds is a row with its error.
--tiny runs everything on a CPU with tiny checkpoints and no caps, to test the script: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import drop_from_page_cache
from benchmarks.goals import write
from benchmarks.memory_cases import ALL, CASES, CONTENDERS, LONG, MANAGED, Case, Contender, Scale, qwen_graph
from benchmarks.memory_rig import (
    GIB,
    WHOLE_MACHINE,
    SmallerMachine,
    Usage,
    smaller_machine,
    vram_used,
    wait_for_gpu,
    watched,
)
from testing import comfyui, graphs
from testing.measure import environment
from testing.server import Server, ServerDiedError, prepare_base

SAMPLERS = ("sample", "sample_high")
FAILURES = (RuntimeError, OSError)
"""What a graph on too small a machine may end with (the server's errors are RuntimeErrors, and OSErrors where it is gone), and its row says."""


@dataclass
class Row:
    """One case, one contender, one cap. Sizes in bytes, times in seconds; None where it did not get so far.

    Attributes:
        files: whether checkpoints were read from the `disk`, or lay in the page `cache`.
        usage: see `Usage`.
        finite: whether the latent holds neither NaN nor Inf.
        node_seconds: of each node, by its id in the graph.
        quantize_seconds: making the quantized copies, where this row made them; not part of the other times.
    """

    case: str
    contender: str
    steps: int
    vram_cap: int | None
    host_cap: int | None
    files: str
    completed: bool
    error: str | None
    usage: dict[str, int | None]
    finite: bool | None
    quantize_seconds: float | None
    load_seconds: float | None
    seconds_per_step: float | None
    step_seconds: list[float]
    node_seconds: dict[str, float]
    total_seconds: float
    report: dict[str, Any] | None


@dataclass(frozen=True)
class Site:
    """Where ComfyUI works: its base directory, the models, and how files are read."""

    base: Path
    models: Path
    files: str


def make_site(work: Path, files: str) -> Site:
    """A fresh base directory in `work` on the models folder that every call shares."""
    work.mkdir(parents=True, exist_ok=True)
    models = work / "models"
    models.mkdir(exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="base-", dir=work))
    return Site(prepare_base(base, models=models), models, files)


class Steps:
    """When each sampling step was done, and how long each node took, from the server's own events."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.times: dict[str, list[float]] = {}
        self.node_seconds: dict[str, float] = {}
        self._node: tuple[str, float] | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "progress" and str(data.get("node", "")).startswith(SAMPLERS):
            self.times.setdefault(data["node"], []).append(time.monotonic())
        if event["type"] == "executing":
            now = time.monotonic()
            if self._node is not None:
                name, began = self._node
                self.node_seconds[name] = self.node_seconds.get(name, 0.0) + now - began
            self._node = None if data.get("node") is None else (str(data["node"]), now)

    @property
    def seconds(self) -> list[float]:
        """From each step of a sampler to its next one."""
        return [b - a for times in self.times.values() for a, b in zip(times, times[1:], strict=False)]

    @property
    def seconds_per_step(self) -> float | None:
        """The middle of them."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def load_seconds(self) -> float | None:
        """From the queue to the first step, that step itself taken out."""
        first = min((times[0] for times in self.times.values()), default=None)
        return None if first is None else first - self.started - (self.seconds_per_step or 0.0)


def run_server(
    site: Site,
    contender: Contender,
    scale: Scale,
    machine: SmallerMachine = WHOLE_MACHINE,
    synchronized: bool = False,
) -> Server:
    """A fresh ComfyUI with its own defaults; stock has no pack in it. synchronized: see testing/shims/steps.py."""
    return Server(
        site.base,
        comfyui.find(),
        cpu=scale.tiny,
        only_shims=not contender.has_pack,
        launcher=machine.launcher,
        cache=(),
        environment={"LOWBIT_SYNCHRONIZE_STEPS": "1"} if synchronized else None,
        name="benchmark-" + re.sub(r"\W+", "-", contender.name),
    )


def reason(failure: BaseException, kills: int = 0) -> str:
    """A failure's kind and the line that says most: the last one of a log, the first one of anything else."""
    if kills:
        return "killed by the kernel: out of main memory"
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [""]
    return f"{type(failure).__name__}: {lines[-1 if isinstance(failure, ServerDiedError) else 0]}"[:400]


def is_finite(path: Path) -> bool | None:
    """Whether a dumped latent holds numbers only; None where there is none."""
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()) if path.exists() else None


def measure(case: Case, contender: Contender, cap: int | None, site: Site, scale: Scale) -> Row:
    """Runs one case once on a machine of that size."""
    vram = None if cap is None or scale.tiny else cap * GIB
    host = None if scale.tiny or case.host is None else case.host * GIB
    quantizing = case.quantize(site.models) if contender.weight_format or contender.copies else None
    if contender.copies:
        case.name_copies(site.models)
    if site.files == "disk":
        drop_from_page_cache(case.paths(site.models))
    latent = site.base / "output" / "row" / "latent.safetensors"
    latent.unlink(missing_ok=True)
    steps, error, report, usage, machine = Steps(), None, None, Usage(), None
    asked: Any = None
    with contextlib.ExitStack() as stack:
        try:
            wait_for_gpu(vram)
            machine = stack.enter_context(smaller_machine(vram, host))
            baseline = vram_used()
            server = stack.enter_context(run_server(site, contender, scale, machine, synchronized=True))
            stack.enter_context(watched(server.process.pid, baseline, usage, machine.group))
            graph = graphs.dump(case.graph_for(scale, contender, server), "row", latent=["sample", 0])
            asked = graph["sample"]["inputs"]["steps"]
            steps.started = time.monotonic()
            result = server.run(graph, timeout=scale.seconds, on_event=steps)
            report = json.loads(result.outputs["json"]["text"][0]) if contender.managed else None
        except FAILURES as failure:
            error = reason(failure, machine.group.kills() if machine and machine.group else 0)
        total = time.monotonic() - steps.started
    if report is not None:
        report.pop("samples")
    return Row(
        case=case.name,
        contender=contender.name,
        steps=asked if isinstance(asked, int) else sum(map(len, steps.times.values())),
        vram_cap=vram,
        host_cap=host,
        files=site.files,
        completed=error is None,
        error=error,
        usage=asdict(usage),
        finite=is_finite(latent),
        quantize_seconds=quantizing,
        load_seconds=steps.load_seconds,
        seconds_per_step=steps.seconds_per_step,
        step_seconds=[round(seconds, 4) for seconds in steps.seconds],
        node_seconds={name: round(seconds, 3) for name, seconds in steps.node_seconds.items()},
        total_seconds=total,
        report=report,
    )


def measure_growth(case: Case, site: Site, scale: Scale) -> dict[str, Any]:
    """Allocated and reserved bytes at the end of each sampling run, beside the third one."""
    graph = case.graph(scale, MANAGED)
    marks: list[dict[str, int]] = []
    notes: list[str] = []
    error = None
    deadline = time.monotonic() + scale.seconds
    try:
        with run_server(site, MANAGED, scale) as server:
            for seed in range(scale.prompts if case.name == "50_generations" else 1):
                graph["sample"]["inputs"]["seed"] = seed
                result = server.run(graph, timeout=max(1.0, deadline - time.monotonic()))
                report = json.loads(result.outputs["json"]["text"][0])
                notes += report["notes"]
                marks += [
                    {key: sample[key] for key in ("allocated", "reserved", "host_resident")}
                    for sample in report["samples"]
                    if sample["phase"] == "sampled"
                ]
    except FAILURES as failure:
        error = reason(failure)
    found = {
        "case": case.name,
        "steps": graph["sample"]["inputs"]["steps"],
        "runs": len(marks),
        "error": error,
        "growth_over_third": None,
        "marks": marks,
        "notes": notes,
    }
    if len(marks) > 3:
        third = marks[2]
        found["growth_over_third"] = {
            key: max(mark[key] / max(1, third[key]) - 1 for mark in marks[3:]) for key in third
        }
    return found


def measure_overhead(case: Case, site: Site, scale: Scale) -> dict[str, Any]:
    """Seconds per step with the manager on `auto` and without it, in turns, with memory to spare."""
    names = {"no manager": Contender("plain"), "manager, auto": MANAGED}
    found: dict[str, list[float]] = {name: [] for name in names}
    error = None
    deadline = time.monotonic() + scale.seconds
    try:
        with run_server(site, MANAGED, scale) as server:
            for turn in range(1 + scale.pick(4, 2)):
                for name, contender in names.items():
                    graph = qwen_graph(scale, contender)
                    graph["sample"]["inputs"]["seed"] = turn
                    steps = Steps()
                    server.run(graph, timeout=max(1.0, deadline - time.monotonic()), on_event=steps)
                    if turn and steps.seconds_per_step is not None:  # the first turn loads and compiles
                        found[name].append(steps.seconds_per_step)
    except FAILURES as failure:
        error = reason(failure)
    best = {name: min(values) for name, values in found.items() if values}
    slower = best["manager, auto"] / best["no manager"] - 1 if len(best) == len(found) else None
    return {"case": case.name, "error": error, "seconds_per_step": found, "slower_by": slower}


def keep(options: argparse.Namespace, kind: str, entry: dict[str, Any]) -> None:
    """Adds a row, growth run or overhead measurement to the JSON file, and tells it on stdout without what is long."""
    empty: dict[str, Any] = {"rows": [], "growth": [], "overhead": []}
    results = json.loads(options.out.read_text()) if options.out.exists() else empty
    results["environment"] = environment() | {"comfyui": comfyui.version(comfyui.find()), "tiny": options.tiny}
    results[kind].append(entry)
    partial = options.out.with_suffix(".partial")
    write(partial, results)
    partial.replace(options.out)  # a call that is ended while it writes keeps the rows before
    print(json.dumps({key: value for key, value in entry.items() if key not in ("report", "marks")}), flush=True)


def run_case(case: Case, options: argparse.Namespace, site: Site, scale: Scale) -> None:
    """Every cap and contender of a case that was asked for."""
    case.write(site.models, scale)
    chosen = [cap for cap in case.vram if cap in (options.caps or case.vram)]
    for cap in [0] if scale.tiny else chosen:
        for contender in case.contenders:
            if options.contenders and contender.name not in options.contenders:
                continue
            row = measure(case, contender, cap or None, site, scale)
            keep(options, "rows", asdict(row))
            if not row.completed:
                show_logs(site)


def show_logs(site: Site) -> None:
    """The end of the last server's log, for whoever looks for the reason."""
    logs = sorted(site.base.glob("benchmark-*.log"), key=lambda path: path.stat().st_mtime)
    for line in logs[-1].read_text(errors="replace").splitlines()[-25:] if logs else ():
        print(f"  | {line[:300]}", flush=True)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--caps", nargs="*", type=int, help="only these GPU sizes, in GiB; 0: the whole GPU")
    parser.add_argument("--contenders", nargs="*", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--windows", type=int, help="of infinitetalk")
    parser.add_argument("--seconds", type=float, default=Scale.seconds, help="the most a graph or growth run may take")
    parser.add_argument("--files", choices=("disk", "cache"), default="disk", help="drop files from the page cache?")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="test the script on a CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="lowbit-memory-"))).resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases that were asked for and writes each row at once."""
    options = read_options(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("This needs an NVIDIA GPU; --tiny tests the script without one.", file=sys.stderr)
        return 1
    scale = Scale(
        options.tiny,
        options.steps,
        5 if options.tiny else 50,
        options.windows or (3 if options.tiny else 20),
        options.seconds,
    )
    site = make_site(options.work, options.files)
    for name in options.only:
        if name in CASES:
            run_case(CASES[name], options, site, scale)
            continue
        LONG[name].write(site.models, scale)
        if name == "overhead":
            keep(options, "overhead", measure_overhead(LONG[name], site, scale))
        else:
            keep(options, "growth", measure_growth(LONG[name], site, scale))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and cgroups are cleared away
    sys.exit(main())
