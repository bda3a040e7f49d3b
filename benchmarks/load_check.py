"""What it costs a load to look whether a file holds nothing but numbers: the same run with and without, in turns.

python -m benchmarks.load_check --out benchmarks/results/load_check.json [--blocks 8] [--rounds 7] [--legacy]

Files are random at the scale of a trained model's, none of them of this pack's cache, which is not looked at. A load goes from the
file's name to weights that were used once, at the end of the first of four steps. What the look costs is what the whole run takes
longer, all steps and the wait for the answer counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from benchmarks.steps import DEVICE, Case, clean, sample, wan_case
from testing.core import start_core
from testing.measure import environment

KINDS = {"bf16": None, "fp8": "fp8_e4m3fn_scaled", "int8": "int8_convrot_fast", "nvfp4": "fp4_scaled"}
"""What a file holds -> the format that it is written in; None for the source itself."""
LATENT = (1, 16, 9, 60, 104) if DEVICE == "cuda" else (1, 16, 1, 16, 16)
STEPS = 4
LARGEST_SHARE = 5.0
"""Percent of a load."""


def write_files(folder: Path, case: Case) -> dict[str, Path]:
    """One file of each kind."""
    from lowbit.ops.checkpoint import open_checkpoint
    from lowbit.ops.formats import FORMATS
    from lowbit.ops.plan import make_plan
    from lowbit.ops.stream import quantize_checkpoint

    files = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    source = open_checkpoint(write_checkpoint(files["bf16"], case.shapes, case.metadata))
    for kind, name in KINDS.items():
        if name is not None:
            quantize_checkpoint(source, make_plan(source, FORMATS[name], None), files[kind], device=DEVICE)
    return files


def run_once(path: Path, case: Case, looked_at: bool) -> tuple[float, float]:
    """Seconds from the file's name to used weights, and to the end of the run."""
    import comfy.model_management

    from lowbit.host.weights import checked, loading
    from lowbit.ops.checkpoint import open_checkpoint

    stamps = open_checkpoint(path).stamps
    (checked.known_finite.discard if looked_at else checked.known_finite.add)(stamps)
    began = time.perf_counter()
    model = loading.load_diffusion_model(str(path))
    comfy.model_management.load_models_gpu([model])
    placed = time.perf_counter() - began
    _, steps = sample(model, case, STEPS)
    seconds = time.perf_counter() - began
    assert stamps in checked.known_finite
    del model
    clean()
    return placed + steps[0], seconds


def measure(kind: str, path: Path, case: Case, rounds: int) -> dict[str, Any]:
    """One row: medians, of the difference that of two runs beside each other, since machines drift."""
    runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for looked_at in (turn % 2 == 0, turn % 2 == 1):
            seconds = run_once(path, case, looked_at)
            if turn:
                runs[looked_at].append(seconds)
    (load, run), (load_looked_at, run_looked_at) = (
        map(statistics.median, zip(*runs[which], strict=True)) for which in (False, True)
    )
    longer = statistics.median(looked[1] - plain[1] for looked, plain in zip(runs[True], runs[False], strict=True))
    return {
        "kind": kind,
        "gigabytes": path.stat().st_size / 1e9,
        "load_seconds": load,
        "load_seconds_with_the_check": load_looked_at,
        "run_seconds": run,
        "run_seconds_with_the_check": run_looked_at,
        "longer_seconds": longer,
        "all": {"without": runs[False], "with": runs[True]},
        "share_of_load": 100 * longer / load,
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the look costs a load."""
    goal = Goal("looking for NaN and Inf in a file, of its load", LARGEST_SHARE, "%", at_most=True)
    return [goal.judged(row["share_of_load"] for row in rows)]


def main() -> None:
    """Every kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--blocks", type=int, default=8, help="of Wan 14B")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--legacy", action="store_true", help="without dynamic VRAM")
    parser.add_argument("--work", type=Path, help="folder for the files")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    case = wan_case("832x480x33", arguments.blocks, LATENT)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        options = [] if DEVICE == "cuda" else ["--cpu"]
        start_core(["--base-directory", folder, *options, *(["--disable-dynamic-vram"] if arguments.legacy else [])])
        with torch.inference_mode():
            files = write_files(Path(folder), case)
            rows = []
            for kind in arguments.kinds:
                rows.append(measure(kind, files[kind], case, arguments.rounds))
                print(rows[-1], flush=True)
                memory = "legacy" if arguments.legacy else "dynamic VRAM where the GPU has it"
                header = environment() | {"processors": str(os.cpu_count()), "memory": memory}
                write(out, {"environment": header, "model": case.title, "rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    main()
