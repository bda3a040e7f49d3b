"""Times the streaming quantizer on a synthetic 4 GiB checkpoint, beside a plain copy and a whole state dict in memory.

    python -m benchmarks.quantize [--gib 4] [--device cpu] [--out benchmarks/results/quantize-cpu.json]

Each row runs in a process of its own; peak memory is that process's growth over its idle state.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import write
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.layouts import register_layouts
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import quantize_to_tensor
from lowbit.ops.stream import quantize_checkpoint
from testing.measure import environment

DIM, FFN = 3072, 12288
"""Qwen-Image's sizes."""

FORMAT_NAMES = ("fp8_e4m3fn_scaled", "mxfp8", "int8", "int8_convrot_fast", "fp4_scaled", "int4_convrot_fast")
COPY, WHOLE = "plain copy", "whole state dict, then fp8_e4m3fn_scaled"


def source_shapes(gib: float) -> dict[str, tuple[int, ...]]:
    """MLP matrices of so many GiB in 16 bits."""
    block_bytes = 2 * 2 * DIM * FFN
    return {
        f"transformer_blocks.{block}.img_mlp.{name}.weight": shape
        for block in range(max(1, round(gib * 2**30 / block_bytes)))
        for name, shape in (("net.0.proj", (FFN, DIM)), ("net.2", (DIM, FFN)))
    }


def measure(what: str, source: Path, target: Path, device: str) -> dict[str, float]:
    """Run one row in this process."""
    register_layouts()
    if what in FORMATS:
        quantize_to_tensor(torch.randn(256, 256, device=device), FORMATS[what])
    idle = peak_resident_kib()
    start = time.perf_counter()
    if what == COPY:
        shutil.copyfile(source, target)
    elif what == WHOLE:
        quantize_whole(source, target, device)
    else:
        checkpoint = open_checkpoint(source)
        quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[what], None), target, device=device)
    seconds = time.perf_counter() - start
    peak = peak_resident_kib() - idle
    return {"seconds": seconds, "peak_mib": peak / 1024, "target_mib": target.stat().st_size / 2**20}


def peak_resident_kib() -> int:
    """This process's own high-water mark: `ru_maxrss` would start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def quantize_whole(source: Path, target: Path, device: str) -> None:
    """What a loader does that has no streaming: everything read, everything quantized, everything written."""
    tensors = {}
    for name, weight in load_file(source).items():
        quantized = quantize_to_tensor(weight.to(device), FORMATS["fp8_e4m3fn_scaled"])
        tensors.update({key: value.cpu() for key, value in quantized.state_dict(name).items()})
    save_file(tensors, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        write_checkpoint(source, source_shapes(options.gib))
        source_bytes, rows = source.stat().st_size, {}
        for what in (COPY, WHOLE, *FORMAT_NAMES):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                row = process.apply(measure, (what, source, target, options.device))
            row["source_mb_per_second"] = source_bytes / 1e6 / row["seconds"]
            rows[what] = {key: round(value, 1) for key, value in row.items()}
            print(f"{what:42} {row['source_mb_per_second']:8.0f} MB/s  peak +{row['peak_mib']:7.0f} MiB", flush=True)
            target.unlink()
    result = {
        "what": "streaming quantizer, verified by reading back; MB/s of the bf16 source, peak growth of resident memory",
        "environment": environment() | {"processor_threads": torch.get_num_threads()},
        "source_mib": round(source_bytes / 2**20, 1),
        "largest_tensor_mib": 2 * DIM * FFN / 2**20,
        "rows": rows,
    }
    if options.out is not None:
        write(options.out, result)


if __name__ == "__main__":
    main()
