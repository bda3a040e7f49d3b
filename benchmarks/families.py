"""Measures what each architecture of ComfyUI's loses by quantizing: a tiny model's forward, and bytes at the real size.

python -m benchmarks.families [--out benchmarks/results/families.json] [--only NAME ...]
Runs ComfyUI's classes (COMFYUI_PATH) on a CPU, where activations of the FP8 and FP4 formats are not quantized.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.goals import Goal, Record, write
from testing import comfyui
from testing.core import start_core
from testing.measure import environment, relative_error

FORMATS = ("int8_convrot_fast", "fp8_e4m3fn_scaled", "fp4_scaled")
DRAWS = 3
"""Random weights of each tiny model: their mean error is told."""

NEAR = 2.0
"""An error of at most this many times Wan's is near it."""
MOST_KEPT = 15
"""Percent of a model's bytes."""


def measured(name: str) -> Record:
    """One architecture's row.

    The tiny model keeps what the real one does: its rules are those that were affordable at the real size.
    """
    from lowbit.ops.keep_rules import KEEP
    from testing.planned import plan_of, with_plan
    from testing.tiny.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    plans = {format_name: plan_of(architecture.real_sized(), format_name) for format_name in FORMATS}
    errors: dict[str, list[float]] = {format_name: [] for format_name in FORMATS}
    for seed in range(DRAWS):
        weights = architecture.weights(seed)
        plain = architecture.small()
        plain.load_state_dict(weights, strict=False)
        expected = architecture.run(plain)
        for format_name, plan in plans.items():
            rules = [replace(rule, most_added=math.inf) for rule in plan.rules]
            model = with_plan(architecture, weights, plan_of(plain, format_name, rules))
            errors[format_name].append(relative_error(architecture.run(model), expected))
    eight_bits, *_, four_bits = plans.values()
    kept = sum(layer.nbytes_after for layer in eight_bits.layers.values() if layer.action == KEEP)
    raised = [layer for layer in four_bits.layers.values() if layer.weight_format == "int8"]
    return {
        "name": name,
        "family": eight_bits.family.name,
        "errors": {format_name: statistics.fmean(found) for format_name, found in errors.items()},
        "model_bytes": eight_bits.nbytes_before,
        "kept_bytes": kept,
        "kept_share": kept / eight_bits.nbytes_before,
        "fp4_bytes": four_bits.nbytes_after,
        "fp4_bytes_in_8_bits": sum(layer.nbytes_after for layer in raised),
    }


def with_wan(rows: list[Record]) -> list[Record]:
    """The rows, each with its errors as parts of the middle one of Wan's kinds."""
    kinds = [row["errors"] for row in rows if row["family"].startswith("Wan")]
    wan = {name: statistics.median(errors[name] for errors in kinds) for name in FORMATS}
    return [row | {"times_wan": {name: row["errors"][name] / wan[name] for name in FORMATS}} for row in rows]


def goals(rows: list[Record]) -> list[Record]:
    """For each format the architectures whose error is near Wan's, and what is kept of any."""
    entries = []
    for name in FORMATS:
        near = [row["times_wan"][name] <= NEAR for row in rows]
        goal = Goal(f"{name}: architectures whose error is at most {NEAR:g} times Wan's", 100, "%")
        entries.append(goal.judged([100 * sum(near) / len(near)]))
    kept = Goal("kept in 16 bits by 8-bit formats, of a model's bytes", MOST_KEPT, "%", at_most=True)
    return [*entries, kept.judged(100 * row["kept_share"] for row in rows)]


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--only", nargs="*", help="names of architectures (default: all, and the file is written)")
    options = parser.parse_args()
    start_core(["--cpu"])
    from testing.tiny.architectures import ARCHITECTURES

    rows = []
    for name in options.only or ARCHITECTURES:
        rows.append(measured(name))
        print(name, {kind: f"{100 * error:.2g} %" for kind, error in rows[-1]["errors"].items()}, flush=True)
    if not options.only:
        facts = environment(f"ComfyUI {comfyui.version(comfyui.find())}")
        rows = with_wan(rows)
        write(options.out, {"environment": facts, "near": NEAR, "rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    main()
