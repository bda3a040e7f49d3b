"""Measures what each weight format costs: error of Gaussian weights, and of a product with outliers in the activations.

python -m benchmarks.formats [--out benchmarks/results/formats.json]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.goals import write
from lowbit.ops.formats import FORMATS
from lowbit.ops.linear import quantized_linear
from lowbit.ops.quantize import quantize_to_tensor
from testing.measure import environment, plain_tensors, relative_error

SIZE, ROWS, OUTLIER_COLUMNS, OUTLIER_FACTOR = 2048, 256, 16, 60
SEEDS = (0, 1, 2)


def measure(name: str, seed: int, device: str) -> dict[str, float]:
    """One format with one seed: weight error, and product error on plain activations and with outliers."""
    torch.manual_seed(seed)
    row = FORMATS[name]
    weight = (torch.randn(SIZE, SIZE) * 0.02).to(device, torch.bfloat16)
    x = torch.randn(ROWS, SIZE).to(device, torch.bfloat16)
    outliers = x.clone()
    outliers[:, torch.randperm(SIZE)[:OUTLIER_COLUMNS]] *= OUTLIER_FACTOR
    quantized = quantize_to_tensor(weight, row)
    nbytes = sum(part.nbytes for part in plain_tensors(quantized))
    return {
        "bits_per_weight": 8 * nbytes / weight.numel(),
        "weight_error": relative_error(quantized.dequantize(), weight),
        "product_error": relative_error(quantized_linear(x, quantized, fast=row.fast), x.double() @ weight.double().T),
        "product_error_with_outliers": relative_error(
            quantized_linear(outliers, quantized, fast=row.fast), outliers.double() @ weight.double().T
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/formats.json"))
    options = parser.parse_args()
    rows = {}
    for name in FORMATS:
        runs = [measure(name, seed, options.device) for seed in SEEDS]
        rows[name] = {key: float(f"{statistics.median(run[key] for run in runs):.4g}") for key in runs[0]}
        print(f"{name:24} {rows[name]}", flush=True)
    result = {
        "what": f"relative Frobenius error, {SIZE}x{SIZE} Gaussian weights, median of {len(SEEDS)} seeds; products of "
        f"{ROWS} rows in bfloat16, the outliers {OUTLIER_FACTOR} times larger in "
        f"{OUTLIER_COLUMNS} columns",
        "environment": environment(),
        "rows": rows,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
