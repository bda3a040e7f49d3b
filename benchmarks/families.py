"""Measures what each architecture of ComfyUI's loses by quantizing: a tiny model's forward, and bytes at the real size.

python -m benchmarks.families [--out benchmarks/results/families.json] [--only NAME ...]
Runs ComfyUI's classes (COMFYUI_PATH) on a CPU, where activations of the FP8 and FP4 formats are not quantized.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.goals import Goal, Record, write
from lowbit.ops.keep_rules import EIGHT_BITS, KEEP, MODULATION_LAYERS, QUANTIZE, Rule
from lowbit.ops.plan import LayerPlan
from testing import comfyui
from testing.core import start_core
from testing.measure import environment, relative_error
from testing.tiny.architectures import ARCHITECTURES, DiffusionModel
from testing.tiny.tensors import Tensors

FORMATS = ("int8_convrot_fast", "fp8_e4m3fn_scaled", "fp4_scaled")
FP8, FP4 = FORMATS[1:]
MODULATION_BITS = {FP8: {"8": QUANTIZE, "16": KEEP}, FP4: {"4": QUANTIZE, "8": EIGHT_BITS, "16": KEEP}}
"""Format -> bits of modulation -> what a rule does for it."""

DRAWS = 3
"""Random weights of each tiny model: their mean error is told."""

NEAR = 2.0
"""An error of at most this many times Wan's is near it."""
NEAR_PART = 1.5
"""So is what the keep rules leave of the error that there is without them: a part, which cannot be far above Wan's half."""
MOST_KEPT = 15
"""Percent of a model's bytes."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny model with random weights, plain, and what it makes of its inputs."""

    architecture: DiffusionModel
    weights: Tensors
    plain: torch.nn.Module
    expected: torch.Tensor

    def error(self, format_name: str, rules: Iterable[Rule]) -> float:
        """Of the model quantized by `rules`, whatever they add at this size."""
        from testing.planned import plan_of, with_plan

        always = [replace(rule, most_added=math.inf) for rule in rules]
        model = with_plan(self.architecture, self.weights, plan_of(self.plain, format_name, always))
        return relative_error(self.architecture.run(model), self.expected)


def tiny_model(architecture: DiffusionModel, seed: int) -> TinyModel:
    """The tiny model with the weights of a seed."""
    weights, plain = architecture.weights(seed), architecture.small()
    plain.load_state_dict(weights, strict=False)
    return TinyModel(architecture, weights, plain, architecture.run(plain))


def row_of(name: str) -> Record:
    """One architecture's row.

    The tiny models keep what the real one does: their rules are those that were affordable at the real size.
    """
    from testing.planned import plan_of

    architecture = ARCHITECTURES[name]
    plans = {format_name: plan_of(architecture.real_sized(), format_name) for format_name in FORMATS}
    models = [tiny_model(architecture, seed) for seed in range(DRAWS)]
    errors = {
        format_name: statistics.fmean(model.error(format_name, plan.rules) for model in models)
        for format_name, plan in plans.items()
    }
    without_rules = {name: statistics.fmean(model.error(name, ()) for model in models) for name in FORMATS}
    modulation = {}
    for format_name, actions in MODULATION_BITS.items():
        plan = plans[format_name]
        others = [rule for rule in plan.rules if rule.action != EIGHT_BITS and rule.pattern != MODULATION_LAYERS]
        if any(map(is_modulation, plan.layers.values())):
            modulation[format_name] = {
                bits: models[0].error(format_name, [*others, Rule(MODULATION_LAYERS, action)])
                for bits, action in actions.items()
            }
    eight_bits, *_, four_bits = plans.values()
    kept = sum(layer.nbytes_after for layer in eight_bits.layers.values() if layer.action == KEEP)
    raised = [layer for layer in four_bits.layers.values() if layer.weight_format == "int8"]
    return {
        "name": name,
        "family": eight_bits.family.name,
        "modulation_errors": modulation,
        "modulation_share": sum(layer.nbytes_before for layer in eight_bits.layers.values() if is_modulation(layer))
        / eight_bits.nbytes_before,
        "errors": errors,
        "errors_without_rules": without_rules,
        "part_left": {name: errors[name] / without_rules[name] for name in FORMATS},
        "model_bytes": eight_bits.nbytes_before,
        "kept_bytes": kept,
        "kept_share": kept / eight_bits.nbytes_before,
        "fp4_bytes": four_bits.nbytes_after,
        "fp4_bytes_in_8_bits": sum(layer.nbytes_after for layer in raised),
    }


def is_modulation(layer: LayerPlan) -> bool:
    """Whether it is modulation of a block."""
    return not Rule("*", outside_blocks=True).matches(layer.name) and Rule(MODULATION_LAYERS).matches(layer.name)


def with_wan(rows: list[Record]) -> list[Record]:
    """The rows, with errors, and what is left of those without rules, over the middle one of Wan's kinds."""
    for key, times in (("errors", "times_wan"), ("part_left", "part_left_times_wan")):
        kinds = [row[key] for row in rows if row["family"].startswith("Wan")]
        wan = {name: statistics.median(found[name] for found in kinds) for name in FORMATS}
        rows = [row | {times: {name: row[key][name] / wan[name] for name in FORMATS}} for row in rows]
    return rows


def goals(rows: list[Record]) -> list[Record]:
    """For each format the architectures whose error is near Wan's, and what is kept of any."""
    entries = []
    for what, key, limit in (
        ("error is", "times_wan", NEAR),
        ("keep rules leave a part of the error without them", "part_left_times_wan", NEAR_PART),
    ):
        for name in FORMATS:
            near = [row[key][name] <= limit for row in rows]
            goal = Goal(f"{name}: architectures whose {what} at most {limit:g} times Wan's", 100, "%")
            entries.append(goal.judged([100 * sum(near) / len(near)]))
    found = [row["modulation_errors"][FP4] for row in rows if row["modulation_errors"]]
    modulation = Goal(f"{FP4}: error with modulation in 8 bits over that in 16", 1.05, "x", at_most=True)
    entries.append(modulation.judged(errors["8"] / errors["16"] for errors in found))
    kept = Goal("kept in 16 bits by 8-bit formats, of a model's bytes", MOST_KEPT, "%", at_most=True)
    return [*entries, kept.judged(100 * row["kept_share"] for row in rows)]


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--only", nargs="*", help="names of architectures (default: all, and the file is written)")
    options = parser.parse_args()
    start_core(["--cpu"])
    rows = []
    for name in options.only or ARCHITECTURES:
        rows.append(row_of(name))
        print(name, {kind: f"{100 * error:.2g} %" for kind, error in rows[-1]["errors"].items()}, flush=True)
    if not options.only:
        facts = environment(f"ComfyUI {comfyui.version(comfyui.find())}")
        rows = with_wan(rows)
        write(options.out, {"environment": facts, "near": NEAR, "rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    main()
