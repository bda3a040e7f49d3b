"""Draws the attention charts from the benchmark's JSON: speed over core by shape, and error by sequence length.

    python benchmarks/plot_attention.py benchmarks/results/attention.json

Needs matplotlib. Writes attention.svg and attention_error.svg beside the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {"exact": "#4c78a8", "fast": "#e45756"}
NOISE = {
    "sageattn_3_fp8": "#e45756",
    "sageattn_fp16": "#f2a541",
    "comfy_kitchen_int8": "#72b7b2",
    "cudnn": "#4c78a8",
}


def caption(result: dict) -> str:
    """GPU, versions and date, for under a title."""
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return f"{result['gpu']}, torch {result['torch']}, {packages}, {result['date'][:10]}"


def speed_chart(result: dict, path: Path) -> None:
    """Bars: how many times as fast as ComfyUI's default `auto` is, by shape, under two budgets."""
    rows = result["shapes"]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    for offset, budget in ((-0.2, "exact"), (0.2, "fast")):
        values = [row["budgets"][budget]["speedup_over_core"] for row in rows]
        positions = [index + offset for index in range(len(rows))]
        axes.barh(positions, values, height=0.38, color=COLORS[budget], label=f"auto, {budget}")
        for position, value, row in zip(positions, values, rows, strict=True):
            label = f"{value:.2f}  {row['budgets'][budget]['chosen']}"
            axes.text(value + 0.02, position, label, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 2.9)
    axes.set_xlabel("times as fast as ComfyUI 0.33's default attention, Gaussian data")
    axes.set_title(f"Attention (Lowbit)\n{caption(result)}", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def error_chart(result: dict, path: Path) -> None:
    """Lines: relative error against float32 by sequence length, for two kinds of data."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, data in zip(panels, ("gaussian", "outliers"), strict=True):
        rows = [row for row in result["noise"] if row["data"] == data]
        for name, color in NOISE.items():
            points = [(row["tokens"], row["errors"][name]) for row in rows if name in row["errors"]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(data, fontsize=9)
        axes.set_xlabel("tokens")
        for limit in (0.02, 0.05):
            axes.axhline(limit, color="gray", linewidth=0.7, linestyle="--")
    panels[0].set_ylabel("relative error against float32")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"Error by sequence length; dashed: the budgets balanced and fast\n{caption(result)}", fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Draws both charts beside the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    plt.rcParams["svg.hashsalt"] = "lowbit"
    speed_chart(result, path.with_suffix(".svg"))
    if result.get("noise"):
        error_chart(result, path.with_name(f"{path.stem}_error.svg"))


if __name__ == "__main__":
    main()
