"""What limits the few-row kernels: runs them once per format for Nsight Compute, or sums up what it wrote.

ncu --clock-control none -k 'regex:_(matmul|split|words|decode|sum).*' --metrics METRICS --csv \
    python benchmarks/profile_linear.py > profile.csv        (METRICS: the keys of `METRICS`, joined by commas)
python benchmarks/profile_linear.py --summarize profile.csv --out benchmarks/results/linear_profile.json
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import timing  # noqa: E402
from goals import write  # noqa: E402

from lowbit.ops.layouts import register_layouts  # noqa: E402
from lowbit.ops.linear import quantized_linear  # noqa: E402

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "l1_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active_percent",
}
FORMATS = {
    "fp8": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
}
N, K, ROWS, REPEATS = 14336, 4096, (1, 16), 2


def workload() -> None:
    """Every format at every row count, `REPEATS` times, in order."""
    register_layouts()
    for layout, options in FORMATS.values():
        values = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
        weight = QuantizedTensor.from_float(values, layout, **options)
        for rows in ROWS:
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            for _ in range(REPEATS):
                quantized_linear(x, weight, fast=False)
            torch.cuda.synchronize()


def summarize(text: str) -> list[dict]:
    """Kernel, grid and metrics of every launch, in order."""
    launches: dict[str, dict] = {}
    for row in csv.DictReader(text[text.index('"ID"') :].splitlines()):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row["Grid Size"]})
        launch[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summarize", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.summarize is None:
        workload()
        return
    record = {
        "summarized_on": timing.environment()["date"],
        "workload": {"n": N, "k": K, "rows": ROWS, "repeats": REPEATS, "formats": list(FORMATS)},
        "launches": summarize(arguments.summarize.read_text()),
    }
    write(arguments.out, record)


if __name__ == "__main__":
    main()
