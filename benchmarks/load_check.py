"""What it costs a load to look whether a file holds nothing but numbers: the same load with and without, in turns.

python -m benchmarks.load_check --out benchmarks/results/load_check.json [--blocks 8] [--rounds 7] [--legacy]

Files are random at the scale of a trained model's, none of them of this pack's cache, which is not looked at. A load goes from the
file's name to weights that were used once: on a GPU to the end of the first small sample, on a CPU to the model being placed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from benchmarks.steps import DEVICE, Case, clean, sample
from testing.core import start_core
from testing.measure import environment
from testing.tiny import wan

KINDS = {"bf16": None, "fp8": "fp8_e4m3fn_scaled", "int8": "int8_convrot_fast", "nvfp4": "fp4_scaled"}
"""What a file holds -> the format that it is written in; None for the source itself."""
SMALL = (1, 16, 1, 16, 16)
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


def load_once(path: Path, case: Case, looked_at: bool) -> float:
    """Seconds from the file's name to used weights."""
    import comfy.model_management

    from lowbit.host.weights import checked, loading
    from lowbit.ops.checkpoint import open_checkpoint

    stamps = open_checkpoint(path).stamps
    (checked.known_finite.discard if looked_at else checked.known_finite.add)(stamps)
    began = time.perf_counter()
    model = loading.load_diffusion_model(str(path))
    comfy.model_management.load_models_gpu([model])
    if DEVICE == "cuda":
        sample(model, replace(case, latent=SMALL), 1)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    assert stamps in checked.known_finite
    del model
    clean()
    return seconds


def check_alone(path: Path) -> float:
    """Seconds to look at a file that is mapped anew, and nothing else."""
    import comfy.utils

    from lowbit.ops.finite import first_not_finite

    tensors = comfy.utils.load_torch_file(str(path))
    began = time.perf_counter()
    first_not_finite(tensors.items())
    return time.perf_counter() - began


def measure(kind: str, path: Path, case: Case, rounds: int) -> dict[str, Any]:
    """One row."""
    times: dict[bool, list[float]] = {True: [], False: []}
    alone = []
    for turn in range(rounds + 1):
        for looked_at in (turn % 2 == 0, turn % 2 == 1):
            seconds = load_once(path, case, looked_at)
            if turn:
                times[looked_at].append(seconds)
        alone.append(check_alone(path))
    without, with_check = statistics.median(times[False]), statistics.median(times[True])
    nbytes = path.stat().st_size
    return {
        "kind": kind,
        "gigabytes": nbytes / 1e9,
        "load_seconds": without,
        "load_seconds_with_the_check": with_check,
        "all": {"without": times[False], "with": times[True]},
        "check_alone_gigabytes_per_second": nbytes / 1e9 / statistics.median(alone),
        "share_of_load": 100 * (with_check / without - 1),
    }


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
    config = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=arguments.blocks, text=4096)
    case = Case(f"Wan 14B, {arguments.blocks} of 40 blocks", wan.shapes(config), config.metadata(), SMALL, (512, 4096))
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        options = [] if DEVICE == "cuda" else ["--cpu"]
        start_core(["--base-directory", folder, *options, *(["--disable-dynamic-vram"] if arguments.legacy else [])])
        with torch.inference_mode():
            files = write_files(Path(folder), case)
            rows = []
            for kind in arguments.kinds:
                rows.append(measure(kind, files[kind], case, arguments.rounds))
                print(rows[-1], flush=True)
    goal = Goal("looking for NaN and Inf in a file, of its load", LARGEST_SHARE, "%", at_most=True)
    memory = "legacy" if arguments.legacy else "dynamic VRAM where the GPU has it"
    header = environment() | {"processors": str(os.cpu_count()), "memory": memory}
    goals = [goal.judged(row["share_of_load"] for row in rows)]
    write(out, {"environment": header, "model": case.title, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
