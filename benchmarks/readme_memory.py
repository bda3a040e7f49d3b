"""The README's section on memory, from what benchmarks/memory.py measured."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table
from benchmarks.memory_cases import CONTENDERS

MEMORY_TITLES = {
    "qwen_image": "Qwen-Image, 1328x1328",
    "wan_2_2": "Wan 2.2 14B, 832x480x81",
    "50_generations": "Qwen-Image, one generation after the other",
    "infinitetalk": "InfiniteTalk, one window after the other",
}
MEMORY_NOT_RUN = """It was tested in headless ComfyUI on the CPU, with a stand-in for the GPU's counters, and **not yet on a GPU**:
`benchmarks/memory.py` measures Qwen-Image and Wan 2.2 under VRAM and RAM caps beside stock ComfyUI, and has not run."""


def memory(result: dict[str, Any] | None, pinning: dict[str, Any] | None = None) -> str:
    """ComfyUI on a smaller machine, with and without the manager; growth; what the manager costs.

    result: memory.json; pinning: pinning.json.
    """
    if result is None:
        return MEMORY_NOT_RUN
    order, contenders = list(MEMORY_TITLES), [contender.name for contender in CONTENDERS]
    measured = sorted(
        result["rows"],
        key=lambda row: (
            order.index(row["case"]),
            -(row["vram_cap"] or 0),
            contenders.index(row["contender"]),
        ),
    )
    header = ("", "VRAM", "", "", "peak VRAM", "peak RAM", "s/step", "fastest", "load, s", "total, s")
    # Whoever runs first in a virtual machine that has not been given its memory yet loads longer for it.
    fair = [loads_fairly(row) for row in measured]
    shown = len(header) if any(fair) else -2
    parts = [memory_caption(result), table(header[:shown], [memory_row(row)[:shown] for row in measured])]
    if not all(row.get("step_seconds") for row in measured if row["completed"]):
        parts.append(
            "~: from an earlier run, in which a step was reported when the processor had queued it, which says little over a few "
            "steps; the totals are sound."
        )
    if not all(fair):
        parts.append(
            "Load times are left out where the virtual machine was still being given its memory, at the first one's cost."
        )
    grown = [
        (MEMORY_TITLES[entry["case"]], entry["runs"], entry["steps"], *memory_growth(entry))
        for entry in result["growth"]
    ]
    if grown:
        header = ("the most after the third run, beside it", "runs", "steps each", "allocated", "reserved", "RAM", "")
        parts.append(table(header, grown))
        parts += [window_frames(entry) for entry in result["growth"] if entry["case"] == "infinitetalk"]
    parts += [memory_overhead(entry) for entry in result["overhead"]]
    parts += measuring_share(measured, pinning)
    return "\n\n".join(parts)


def memory_caption(result: dict[str, Any]) -> str:
    """On what and how the rows were measured."""
    facts, rows = result["environment"], result["rows"]
    caps = sorted({(MEMORY_TITLES[r["case"]].split(",")[0], r["host_cap"]) for r in rows if r["host_cap"]})
    hosts = ", ".join(f"{name} {cap / 2**30:.0f} GiB" for name, cap in caps)
    by = {"cgroup": "by a cgroup that ComfyUI is told of", "holder": "by a process that holds the rest"}
    ways = " or ".join(by[way] for way in dict.fromkeys(r["host_cap_by"] for r in rows if r["host_cap_by"]))
    steps = ", ".join(
        f"{MEMORY_TITLES[c].split(',')[0]} {n}" for c, n in dict.fromkeys((r["case"], r["steps"]) for r in rows)
    )
    cold = all(row["files"] == "disk" for row in rows)
    return (
        f"{facts['gpu']}, torch {facts['torch']}, ComfyUI {facts['comfyui']}, comfy-aimdo {facts['comfy-aimdo']} "
        f"(`memory.json`): real dimensions, random weights. The card is filled up to the VRAM given, CUDA's own context "
        f"inside it; main memory is capped at {hosts}, {ways}. Steps: {steps}. Several rows ran beside each other, each on a GPU "
        f"of its own, sharing processor and disk; files were {'read from the disk' if cold else 'in the page cache, which the cap does not count'}; "
        "Wan's two models are one file under two names; the copies in format `auto` were made beforehand. Peaks are the most of ten "
        "looks a second; peak RAM leaves out the page cache."
    )


def memory_row(row: dict[str, Any]) -> tuple[str, ...]:
    """One contender under one cap; where it failed, how."""
    number = "{:.1f}".format
    fair = loads_fairly(row)
    loading = (row["load_seconds"], row["total_seconds"] if row["completed"] else None) if fair else (None, None)
    steps = row.get("step_seconds")  # absent in runs whose steps did not wait for the GPU
    times = (row["seconds_per_step"], min(steps) if steps else None, *loading)
    cells = ["" if time is None else number(time) if time >= 10 else f"{time:.2f}" for time in times]
    if cells[0] and not steps:
        cells[0] = f"~{cells[0]}"
    return (
        MEMORY_TITLES[row["case"]],
        f"{row['vram_cap'] / 2**30:.0f} GiB" if row["vram_cap"] else "all",
        row["contender"],
        ("completed" if row["finite"] is not False else "completed, but not with numbers")
        if row["completed"]
        else f"**failed**: {row['error'][:120].replace('|', '/')}",
        *("" if size is None else f"{size / 2**30:.1f} GiB" for size in (row["usage"]["vram"], main_memory(row))),
        *cells,
    )


def loads_fairly(row: dict[str, Any]) -> bool:
    """Whether as much main memory as its server may take had been touched before."""
    return row.get("memory_touched_gib", 0) << 30 >= max(1, row["host_cap"] or 0)


def main_memory(row: dict[str, Any]) -> int:
    """The most main memory that could not be taken back: by the cgroup's count, or the process's own where there is none."""
    usage = row["usage"]
    return usage["anonymous"] if usage["unreclaimable"] is None else usage["unreclaimable"]


def memory_growth(entry: dict[str, Any]) -> tuple[str, ...]:
    """Allocated, reserved and main memory beside the third run, and what ended it early."""
    growth, measured = entry["growth_over_third"] or {}, ("allocated", "reserved", "host_resident")
    cells = [f"{100 * growth[key]:+.2f} %" if key in growth else "" for key in measured]
    return *cells, (entry["error"] or "")[:120].replace("|", "/")


def window_frames(entry: dict[str, Any]) -> str:
    """Why main memory grows where one graph makes all windows."""
    resident = [mark["host_resident"] for mark in entry["marks"]]
    if len(resident) < 4:
        return "These runs had no caps."
    each = (resident[-1] - resident[2]) / (len(resident) - 3)
    return (
        f"These runs had no caps. InfiniteTalk's windows are nodes of one graph, whose results ComfyUI keeps: {each / 2**20:.0f} MiB "
        f"of main memory a window, where its 81 frames take {832 * 480 * 81 * 3 * 4 / 2**20:.0f}."
    )


def memory_overhead(entry: dict[str, Any]) -> str:
    """What `auto` costs per step where memory is plentiful."""
    if entry["slower_by"] is None:
        return f"What the manager costs with memory to spare was not measured: {entry['error']}"
    best = {name: min(values) for name, values in entry["seconds_per_step"].items()}
    plain, managed = best["no manager"], best["manager, auto"]
    return (
        f"With memory to spare a Qwen-Image step took {plain:.3f} s without a manager and {managed:.3f} s with one on `auto`: "
        f"{100 * entry['slower_by']:+.2f} %."
    )


def measuring_share(rows: list[dict[str, Any]], pinning: dict[str, Any] | None) -> list[str]:
    """How much of the steps' time measuring them took in the worst and the middle row with a manager, and why."""
    reports = [row["report"] for row in rows if row.get("report") and row["report"]["stepping_seconds"]]
    if not reports:
        return []
    shares = sorted(report["measuring_steps_seconds"] / report["stepping_seconds"] for report in reports)
    worst = max(reports, key=lambda report: report["measuring_steps_seconds"] / report["stepping_seconds"])
    took, steps = worst["measuring_steps_seconds"], worst["stepping_seconds"]
    text = (
        f"In the {len(reports)} rows with a manager, measuring took {100 * shares[len(shares) // 2]:.2f} % of the steps' time in "
        f"the middle row, and {took:.2f} s beside {steps:.1f} s of steps ({100 * took / steps:.1f} %) in the worst; it stops "
        "once it is past its share, which a single measurement can be."
    )
    if pinning is not None:
        alone, beside = pinning["alone"], pinning["other_process"]
        text += (
            " The driver answers nobody while another process on the host pins memory: asking what is free took at most "
            f"{alone['mem_get_info']:.1f} ms alone, and {beside['mem_get_info'] / 1000:.1f} s while {pinning['gib']} GiB were "
            "pinned (`pinning.json`), as the server beside each row does when it loads."
        )
    return [text]
