"""Times the streaming quantizer on a synthetic 4 GiB checkpoint, beside a plain copy and a whole state dict in memory.

    python -m benchmarks.quantize [--gib 4] [--device cpu] [--out benchmarks/results/quantize-cpu.json]

Each row runs in a process of its own; peak memory is that process's growth over its idle state.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.goals import write
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import FORMATS
from lowbit.ops.layouts import register_layouts
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import quantize_to_tensor
from lowbit.ops.stream import quantize_checkpoint
from lowbit.ops.writer import CheckpointWriter

DIM, FFN = 3072, 12288
"""Qwen-Image's sizes."""

FORMAT_NAMES = ("fp8_e4m3fn_scaled", "mxfp8", "int8", "int8_convrot_fast", "fp4_scaled", "int4_convrot_fast")
COPY, WHOLE = "plain copy", "whole state dict, then fp8_e4m3fn_scaled"


def write_source(path: Path, gib: float) -> int:
    """Write a checkpoint of MLP matrices with random weights; returns its size in bytes."""
    block_bytes = 2 * 2 * DIM * FFN
    blocks = max(1, round(gib * 2**30 / block_bytes))
    with CheckpointWriter(path, name_bytes=blocks * 120, name_count=2 * blocks, metadata={}) as writer:
        for block in range(blocks):
            for name, shape in (("net.0.proj", (FFN, DIM)), ("net.2", (DIM, FFN))):
                weight = (torch.randn(shape) * 0.02).bfloat16()
                writer.add(f"transformer_blocks.{block}.img_mlp.{name}.weight", weight)
    return path.stat().st_size


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
    parser.add_argument("--row", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row[0], Path(options.row[1]), Path(options.row[2]), options.device)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        source_bytes = write_source(source, options.gib)
        rows = {}
        for what in (COPY, WHOLE, *FORMAT_NAMES):
            command = [sys.executable, "-m", "benchmarks.quantize", "--device", options.device, "--row"]
            output = subprocess.run(
                [*command, what, str(source), str(target)], capture_output=True, text=True, check=True
            )
            row = json.loads(output.stdout.splitlines()[-1])
            row["source_mb_per_second"] = source_bytes / 1e6 / row["seconds"]
            rows[what] = {key: round(value, 1) for key, value in row.items()}
            print(f"{what:42} {row['source_mb_per_second']:8.0f} MB/s  peak +{row['peak_mib']:7.0f} MiB", flush=True)
            target.unlink()
    result = {
        "what": "streaming quantizer, verified by reading back; MB/s of the bf16 source, peak growth of resident memory",
        "date": datetime.date.today().isoformat(),
        "device": device_info(options.device).label,
        "processor_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "comfy_kitchen": importlib.metadata.version("comfy-kitchen"),
        },
        "source_mib": round(source_bytes / 2**20, 1),
        "largest_tensor_mib": 2 * DIM * FFN / 2**20,
        "rows": rows,
    }
    if options.out is not None:
        write(options.out, result)


if __name__ == "__main__":
    main()
