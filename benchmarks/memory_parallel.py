"""Runs the memory benchmark's rows beside each other, one at a time on each GPU, and merges what they measured.

    python -m benchmarks.memory_parallel write_qwen qwen --work FOLDER --out memory.json [--gpus 2] [--seconds 560]
                                           [--files auto|disk|cache] [--fill GIB]
    python -m benchmarks.memory_parallel probe --work FOLDER     (what the machine can do; about 20 seconds)
    python -m benchmarks.memory_parallel merge PART.json ... --out memory.json

Each entry of a plan is a process of its own that sees one GPU; a GPU that is done takes the next entry. Rows are shown as
they come and lie in FOLDER/parts; at the end of --seconds whatever runs is ended, servers among it, and --out gets every
row that any call wrote there. A plan needs its checkpoints' size in FOLDER, and each GPU a server's main memory beside
them (qwen 80 + 60 a GPU, wan 55 + 64, in GiB): on a smaller machine empty FOLDER/models between plans. The processes share
the disk, the page cache and the processor, so load times are those of a machine in use.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import memory_files
from benchmarks.goals import write
from benchmarks.memory_cases import CASES, CONTENDERS
from benchmarks.memory_group import create_group

Entry = tuple[str, ...]
ROOT = Path(__file__).resolve().parents[1]
KEYS = {"rows": ("case", "contender", "dynamic_vram", "vram_cap"), "growth": ("case",), "overhead": ("case",)}
"""What tells one entry of a kind from another: the newest of a key stays."""

OVERHEAD = ("--only", "overhead", "--seconds", "480")
GENERATIONS = ("--only", "50_generations", "--steps", "2", "--seconds", "480")
TALK = ("--only", "infinitetalk", "--steps", "1", "--seconds", "520")
TINY_QWEN = ("--tiny", "--only", "qwen_image", "--contenders")


def row_entries(case: str, *options: str) -> tuple[Entry, ...]:
    """One entry for each of a case's GPU sizes and its contenders without the pack, and one for those with it."""
    return tuple(
        ("--only", case, *options, "--caps", str(cap), "--contenders", *names)
        for cap in CASES[case].vram
        for names in (
            [one.name for one in CONTENDERS if one.has_pack],
            [one.name for one in CONTENDERS if not one.has_pack],
        )
    )


PLANS: dict[str, tuple[Entry, ...]] = {
    "write_qwen": (("--write", "qwen_image", "--quantize"),) * 2,
    "write_wan": (("--write", "wan_2_2", "--quantize"),) * 2,
    "write_talk": (("--write", "infinitetalk"),),
    "qwen": row_entries("qwen_image"),
    "wan": row_entries("wan_2_2", "--steps", "6"),
    "growth": (GENERATIONS, TALK, OVERHEAD),
    "tiny": (
        ("--tiny", "--write", "qwen_image", "--quantize"),
        (*TINY_QWEN, "memory manager, format auto"),
        (*TINY_QWEN, "stock ComfyUI"),
    ),
}
"""Entries of each plan: what one of them writes, others wait for, or write the next file meanwhile.

Plans run one after the other. A call with the same --work goes on where the one before ran out of time.
"""

FILL = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("1000")
kept, end = [], time.monotonic() + float(sys.argv[2])
while len(kept) < int(sys.argv[1]) and time.monotonic() < end:
    kept.append(bytearray(1 << 30))
    kept[-1][::4096] = b"x" * (1 << 18)
print(len(kept), flush=True)
"""
FILLERS = 16
FILL_SECONDS = 30
COLD_RATE = 2.0
"""Gigabytes a second from which on files are read from the disk: four servers share it."""

GRACE = 12
"""Seconds at the end in which processes clear away and parts are merged."""


@dataclass
class Lane:
    """A GPU that takes entries from a list which all GPUs share, until it is empty or the deadline is there."""

    gpu: int
    entries: deque[Entry]
    work: Path
    common: Entry
    deadline: float
    process: subprocess.Popen[str] | None = field(default=None, init=False)

    def run(self) -> None:
        """Runs entries as long as there are any, and time."""
        while True:
            try:
                wanted = self.entries.popleft()
            except IndexError:
                return
            entry = remaining(wanted, sorted((self.work / "parts").glob("*.json")))
            if entry is None:
                self.say(f"has {' '.join(wanted)} already")
                continue
            left = self.deadline - time.monotonic()
            if left < GRACE:
                self.say(f"no time left for {' '.join(entry)}")
                continue
            self.say(f"starts {' '.join(entry)}")
            self.run_one(entry, self.work / "parts" / f"{time.time_ns()}-{self.gpu}.json", left)

    def run_one(self, entry: Entry, part: Path, left: float) -> None:
        """One entry in a session of its own, so that its servers can be ended with it."""
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.memory", *entry, "--work", str(self.work), *self.common]
        if "--write" not in entry:
            command += ["--out", str(part), "--budget", str(left)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(self.gpu), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.say(line.rstrip()[:1500])
        self.say(f"ended with {self.process.wait()} after {time.monotonic() - started:.0f} s")

    def say(self, text: str) -> None:
        """A line of the common output."""
        print(f"[gpu {self.gpu}] {text}", flush=True)

    def end(self, how: signal.Signals) -> None:
        """Signals the process that runs and everything it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)


def remaining(entry: Entry, parts: Iterable[Path]) -> Entry | None:
    """What of an entry is not among the parts: a cap's missing contenders, a growth or overhead measurement, or nothing."""
    if "--write" in entry or "--tiny" in entry:
        return entry
    found = merge(parts)
    case = entry[entry.index("--only") + 1]
    if "--contenders" not in entry:
        done = any(one["case"] == case and not one["error"] for kind in ("growth", "overhead") for one in found[kind])
        return None if done else entry
    cap = int(entry[entry.index("--caps") + 1]) * memory_files.GIB
    done = {row["contender"] for row in found["rows"] if row["case"] == case and row["vram_cap"] == cap}
    names = entry.index("--contenders") + 1
    missing = [name for name in entry[names:] if name not in done]
    return (*entry[:names], *missing) if missing else None


def run_plan(lanes: Sequence[Lane], deadline: float) -> None:
    """All GPUs at once; what runs past the deadline is asked to end, then killed."""
    threads = [threading.Thread(target=lane.run, daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for how, until in ((signal.SIGTERM, deadline - GRACE), (signal.SIGKILL, deadline - GRACE / 3)):
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        for lane, thread in zip(lanes, threads, strict=True):
            if thread.is_alive():
                lane.say(f"out of time: {how.name}")
                lane.end(how)
    for lane in lanes:
        lane.end(signal.SIGKILL)


def merge(parts: Iterable[Path]) -> dict[str, Any]:
    """One result of all parts that can be read, oldest first; the environment is that of the last."""
    found: dict[str, Any] = {"environment": {}} | {kind: {} for kind in KEYS}
    for path in parts:
        try:
            part = json.loads(path.read_text())
        except (OSError, ValueError):  # its process was killed while it wrote
            print(f"{path} cannot be read", flush=True)
            continue
        found["environment"] |= part["environment"]
        for kind, keys in KEYS.items():
            found[kind] |= {tuple(entry[key] for key in keys): entry for entry in part[kind]}
    return found | {kind: list(found[kind].values()) for kind in KEYS}


def write_merged(parts: Iterable[Path], out: Path) -> None:
    """Merges what can be read."""
    merged = merge(parts)
    write(out, merged)
    print(f"{out}: {', '.join(f'{len(merged[kind])} {kind}' for kind in KEYS)}", flush=True)


def fill_memory(gib: int) -> int:
    """Touches that much main memory once, as far as it goes in half a minute; returns the GiB that it was.

    A virtual machine may be given its memory only as it is used, and dirty pages are written out early while it is small.
    """
    started = time.monotonic()
    command = [sys.executable, "-c", FILL, str(-(-gib // FILLERS)), str(FILL_SECONDS)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    fillers = [subprocess.Popen(command, **quiet) for _ in range(FILLERS)]
    touched = sum(int(filler.communicate()[0] or 0) for filler in fillers)  # one that was killed has said nothing
    print(f"{touched} of {gib} GiB touched in {time.monotonic() - started:.0f} s", flush=True)
    return touched


def probe(work: Path) -> dict[str, Any]:
    """What a plan needs: a memory cgroup, disk space and speed, main memory."""
    group = create_group(memory_files.GIB)
    if group is not None:
        group.close()
    work.mkdir(parents=True, exist_ok=True)
    usage = psutil.disk_usage(str(work))
    return {
        "cgroup": None if group is None else str(group.folder.parent),
        "disk_free_gib": round(usage.free / memory_files.GIB),
        "memory_gib": round(psutil.virtual_memory().total / memory_files.GIB),
        "gigabytes_per_second": memory_files.disk_rates(work),
    }


def choose_files(work: Path) -> str:
    """`disk` where it is fast enough for several processes that each load tens of gigabytes, else `cache`."""
    rates = memory_files.disk_rates(work)
    chosen = "disk" if rates["from_disk"] >= COLD_RATE else "cache"
    print(f"GB/s: {rates}; files are read from the {chosen}", flush=True)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Runs plans, a probe, or a merge."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help=f"plans ({', '.join(PLANS)}), or probe, or merge and files")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=560, help="the most that all of it may take")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument(
        "--files",
        choices=("auto", "disk", "cache"),
        default="auto",
        help=f"see benchmarks.memory; auto: from the disk where it gives {COLD_RATE} GB/s",
    )
    parser.add_argument(
        "--fill", type=int, default=0, help="GiB of main memory to touch first: without it no load times are shown"
    )
    options = parser.parse_args(arguments)
    first, *rest = options.what
    if first == "merge":
        write_merged(map(Path, rest), options.out)
        return 0
    if options.work is None or (first != "probe" and (options.out is None or not PLANS.keys() >= set(options.what))):
        parser.error("name plans, with --work and --out")
    work = options.work.resolve()
    if first == "probe":
        print(json.dumps(probe(work)), flush=True)
        return 0
    (work / "parts").mkdir(parents=True, exist_ok=True)
    files = choose_files(work) if options.files == "auto" else options.files
    deadline, touched = started + options.seconds, 0
    for name in options.what:
        if options.fill and not touched and any("--write" not in entry for entry in PLANS[name]):
            touched = fill_memory(options.fill)  # after the files are written: in memory, they take what was touched
        common = ("--files", files, "--touched", str(touched))
        entries = deque(PLANS[name])
        lanes = [Lane(gpu, entries, work, common, deadline - GRACE) for gpu in range(options.gpus)]
        run_plan(lanes, deadline)
    write_merged(sorted((work / "parts").glob("*.json")), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
