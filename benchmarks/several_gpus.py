"""One sample over several GPUs of one host, beside one GPU of the same: seconds a step, the same picture, the workers' start.

    NCCL_NVLS_ENABLE=0 python -m benchmarks.several_gpus --out benchmarks/results/several_gpus.json [--model wan480 wan720 qwen] \
        [--gpus 2 4] [--only NAME ...]

Weights are random at the scale of a trained model's, with fewer blocks, as in benchmarks/steps.py. Workers start once and stay for
the other ways and cases; how long that takes is measured with a small sample, for which attention has nothing to compile. They
start with the node: what comes before "model's file" among a worker's stages costs nothing where ComfyUI has as long to do with
other nodes. Here it has nothing else to do. The workers are started twice: the very first time on a machine ("first_start_seconds")
Triton compiles the kernels for parts of a sample, and Python and the system read what they have never read; after that it is on
disk or in memory, as it is for whoever has used several GPUs before, and that start is judged. PYTHONDONTWRITEBYTECODE is not heeded here.

With NCCL_P2P_DISABLE=1 the GPUs exchange through main memory, as those do that cannot reach each other; such rows are named so.

auto is timed after the steps in which it tries how many processes are the fastest; "tried" has the seconds of each number.
`--devices cpu cpu` tries it without a GPU, on the tiny case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from benchmarks.steps import CASES, INT8, Case, Contender, clean, core_in_memory, load, sample, wan_case
from testing.measure import environment, relative_error
from testing.tiny import wan

STEPS = 8
SMALL = (1, 16, 1, 16, 16)
"""A latent for which hardly anything but the workers' start takes time."""
FIRST_TIMED = 3
TINY = wan.WanConfig(dim=256, ffn=512, heads=2, layers=2, text=4096)
ALL_CASES = CASES | {
    # As many blocks as the smaller one: what is around them is done by every GPU.
    "wan720": lambda: wan_case("1280x720x81", 8, CASES["wan720"]().latent),
    "tiny": lambda: Case("a tiny Wan", wan.shapes(TINY), TINY.metadata(), (1, 16, 3, 12, 20), (8, 4096)),
}


@dataclass(frozen=True)
class Way:
    """How a model is sampled. weights: a format of the loaders, None for the bf16 file. All attention is exact.
    eight_bits: how keys and values travel. cases: where it is measured; none for all of them."""

    name: str
    weights: str | None
    split: str
    eight_bits: bool = False
    cases: tuple[str, ...] = ()


MAIN_MEMORY = "through main memory, "
WAYS = (
    Way("INT8, sequence", INT8, "sequence"),
    Way("INT8, auto", INT8, "auto"),
    Way("bf16, sequence", None, "sequence"),
    Way("exchange in 8 bits, bf16, sequence", None, "sequence", eight_bits=True, cases=("wan480", "tiny")),
    Way(f"{MAIN_MEMORY}INT8, sequence", INT8, "sequence"),
    Way(f"{MAIN_MEMORY}exchange in 8 bits, INT8, sequence", INT8, "sequence", eight_bits=True),
    Way(f"{MAIN_MEMORY}INT8, auto", INT8, "auto"),
)
"""Those through main memory are measured where NCCL_P2P_DISABLE is set, the others where it is not."""
SPEED_GOALS = (
    ("wan480", 2, 1.85),
    ("wan480", 4, 3.5),
    ("wan720", 2, 1.9),
    ("wan720", 4, 3.7),
    ("qwen", 2, 1.6),
)
"""Case, GPUs, times as fast as one GPU; the faster split of INT8 weights counts."""
LARGEST_ERROR = 0.1
"""Percent, of bf16 weights with exact attention, beside one GPU."""
LONGEST_START = 10.0
"""Seconds that the workers may take to start beyond the load of the model."""


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the cases and numbers of GPUs that were run."""
    entries = []
    for case, gpus, factor in SPEED_GOALS:
        found = [row for row in rows if (row["case"], row["gpus"]) == (case, gpus) and row["way"].startswith("INT8")]
        if found:
            fastest = max((row["speedup"] for row in found if "speedup" in row), default=None)
            entries.append(Goal(f"{case}, INT8 weights, {gpus} GPUs beside one", factor, "x").judged([fastest]))
    for case, gpus in dict.fromkeys((row["case"], row["gpus"]) for row in rows if row["gpus"] > 1):
        here = [row for row in rows if (row["case"], row["gpus"]) == (case, gpus)]
        exact = [row for row in here if row["way"].startswith("bf16")]
        if exact:
            name = f"{case}, bf16 weights, exact attention, {gpus} GPUs: error beside one"
            errors = [100 * row["error"] for row in exact if "error" in row]
            entries.append(Goal(name, LARGEST_ERROR, "%", at_most=True).judged(errors))
        starts = [row["start_seconds"] - row["load_seconds"] for row in here if "start_seconds" in row]
        if starts:
            name = f"{case}, {gpus} GPUs: the workers' start beyond the model's load"
            entries.append(Goal(name, LONGEST_START, "s", at_most=True).judged(starts))
    return entries


def run(
    name: str, case: Case, way: Way, path: Path, folder: Path, devices: list[torch.device], alone: dict[str, Any],
    kept: dict[int, Any],
) -> dict[str, Any]:  # fmt: skip
    """One row.

    Args:
        alone: what one GPU made of the same, by case and weights; filled when it is its turn.
        kept: the last model of this number of GPUs, with which its workers stay; filled as well.
    """
    from lowbit.host.dividing import close_all, divide, start_stages
    from lowbit.host.several_gpus.trial import FILE_NAME, TRIES

    contender = Contender(way.name, way.weights, False, "exact")
    small = replace(case, latent=SMALL)
    began = time.perf_counter()
    model, choice = load(contender, path, folder)
    sample(model, small, 1)
    load_seconds = time.perf_counter() - began
    row: dict[str, Any] = {
        "case": name,
        "model": case.title,
        "way": way.name,
        "weights": choice,
        "gpus": len(devices),
        "load_seconds": load_seconds,
    }
    said: list[str] = []
    if len(devices) > 1:
        whole = model

        def divided() -> Any:
            clone = divide(whole, devices, way.split, said.append, eight_bits=way.eight_bits)
            sample(clone, small, 1)
            return clone

        starts = () if len(devices) in kept else ("first_start", "start")
        for start in starts:
            close_all()
            began = time.perf_counter()
            kept[len(devices)] = divided()
            row[f"{start}_seconds"] = time.perf_counter() - began
            row[f"{start}_stages"] = start_stages(devices)
            for worker, stages in row[f"{start}_stages"].items():
                print(worker, {stage: round(seconds, 2) for stage, seconds in stages.items()}, flush=True)
        if not starts:
            kept[len(devices)] = divided()
        model = kept[len(devices)]
    if way.split == "auto" and len(devices) > 1:
        sample(model, case, TRIES * len(devices).bit_length())
        tried = json.loads((folder / "cache" / FILE_NAME).read_text())["measured"] if len(devices) > 2 else {}
        row["tried"] = {what: seconds for machine in tried.values() for what, seconds in machine.items()}
    latent, times = sample(model, case, STEPS)
    row |= {"seconds": statistics.median(times[FIRST_TIMED:]), "steps": times, "said": said}
    key = f"{name} {way.weights}"
    if len(devices) == 1:
        alone[key] = {"latent": latent, "seconds": row["seconds"]}
    elif key in alone:
        row["speedup"] = round(alone[key]["seconds"] / row["seconds"], 3)
        row["error"] = relative_error(latent, alone[key]["latent"])
    return row


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Where a row stands in the table."""
    return [*ALL_CASES].index(row["case"]), [way.name for way in WAYS].index(row["way"]), row["gpus"]


def main() -> None:
    """Every case on one GPU, then on each number of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="*", choices=ALL_CASES, default=list(CASES))
    parser.add_argument("--gpus", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--only", nargs="*", choices=[way.name for way in WAYS])
    parser.add_argument("--devices", nargs="*", help="instead of the GPUs that there are")
    arguments = parser.parse_args()
    present = arguments.devices or [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = [torch.device(name) for name in present]
    out = arguments.out.resolve()
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    counts = [count for count in arguments.gpus if count <= len(devices)]
    through_memory = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
    ways = arguments.only or [way.name for way in WAYS if way.name.startswith(MAIN_MEMORY) == through_memory]
    # What was measured of other models, ways and numbers of GPUs stays.
    anew = [(name, way, count) for name in arguments.model for way in ways for count in (1, *counts)]
    rows = [row for row in before if (row["case"], row["way"], row["gpus"]) not in anew]
    alone: dict[str, Any] = {}
    kept: dict[int, Any] = {}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    with core_in_memory(devices[0].type) as folder:
        from lowbit.host.dividing import close_all

        cases = {name: ALL_CASES[name]() for name in arguments.model}
        paths = {name: folder / f"{name}.safetensors" for name in cases}
        for name, case in cases.items():
            write_checkpoint(paths[name], case.shapes, case.metadata)
        for count, (name, case), way in itertools.product((1, *counts), cases.items(), WAYS):
            if count not in kept:  # workers of another number of GPUs take nothing from these
                kept.clear()
                close_all()
            skipped = way.name not in ways or (way.cases and name not in way.cases)
            if skipped or (count == 1 and f"{name} {way.weights}" in alone):
                continue
            try:
                row = run(name, case, way, paths[name], folder, devices[:count], alone, kept)
            except Exception as error:
                row = {"case": name, "way": way.name, "gpus": count, "failed": f"{type(error).__name__}: {error}"}
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(out, {"environment": environment(), "rows": sorted(rows, key=_place), "goals": goals(rows)})
            clean()


if __name__ == "__main__":
    main()
