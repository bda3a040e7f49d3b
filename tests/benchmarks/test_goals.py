"""A goal is judged on the worst of its rows, and a results file is written with its goals."""

from __future__ import annotations

import json

from benchmarks import families, goals
from benchmarks.goals import Goal

RATE = {"us": 16.0, "tflops": 1.0, "weight_bytes_per_second": 4.0e12, "ratio_to_bf16": None}
FEW = RATE | {"contender": "lowbit", "k": 4096, "n": 14336, "m": 1}


def test_the_worst_of_a_goals_rows_counts_whichever_way_is_worse():
    assert Goal("a", 2.0, "x").judged([3.0, 1.0]) == {
        "name": "a",
        "target": 2.0,
        "unit": "x",
        "at_most": False,
        "measured": 1.0,
        "met": False,
    }
    assert Goal("a", 2.0, "s", at_most=True).judged([1.0, 1.5, None])["measured"] == 1.5
    assert Goal("a", 2.0, "s", at_most=True).judged([None]) | {"met": False} == Goal(
        "a", 2.0, "s", at_most=True
    ).judged([])


def test_linears_are_judged_on_our_rows_alone():
    rows = [
        FEW | {"case": "decode", "format": "fp8_e4m3fn_scaled"},
        FEW | {"case": "decode", "format": "int8", "us": 20.0},
        FEW | {"case": "decode", "format": "int8", "contender": "comfy-kitchen", "us": 99.0},
        FEW | {"case": "qwen_modulation", "format": "int8", "weight_bytes_per_second": 3.5e12},
    ]
    found = {entry["name"]: entry for entry in goals.linear({"results": rows})}
    assert found["FP8, INT8, 1 row, 4,096 to 14,336"]["measured"] == 20.0
    assert found["INT8, 1 row, 3,072 to 18,432"]["met"]
    assert "NVFP4, 16 rows, 4,096 to 14,336" not in found, "what was not measured is left out"


def test_a_file_is_written_with_its_goals(tmp_path):
    path = tmp_path / "results" / "quantize-here.json"
    goals.write(path, {"largest_tensor_mib": 72, "rows": {"plain copy": {"peak_mib": 0}, "int8": {"peak_mib": 150}}})
    (goal,) = json.loads(path.read_text())["goals"]
    assert (goal["measured"], goal["met"]) == (150, False)
    other = tmp_path / "steps.json"
    goals.write(other, {"goals": [{"name": "its own"}]})
    assert json.loads(other.read_text())["goals"] == [{"name": "its own"}]


def test_a_run_with_the_manager_is_judged_beside_the_run_without():
    row = {"case": "wan_2_2", "vram_cap": 24 << 30, "completed": True, "seconds_per_step": 1.0}
    rows = [row | {"contender": "stock ComfyUI", "total_seconds": 50.0}]
    rows += [row | {"contender": "memory manager, bf16 files", "total_seconds": 51.0}]
    (_, beside) = goals.memory({"rows": rows, "growth": [], "overhead": []})
    assert (beside["measured"], beside["met"]) == (1.02, False)


def test_an_architecture_is_near_wan_or_its_goal_is_missed():
    def row(family: str, error: float, kept: float = 0.01, eight_bits: float = 0.02):
        modulation = {"fp4_scaled": {"4": 0.04, "8": eight_bits, "16": 0.02}}
        errors = dict.fromkeys(families.FORMATS, error)
        part = {name: 10 * error for name, error in errors.items()}
        return {
            "family": family,
            "errors": errors,
            "part_left": part,
            "kept_share": kept,
            "modulation_errors": modulation,
        }

    rows = families.with_wan([row("Wan", 0.02), row("Wan VACE", 0.03), row("Wan S2V", 0.04), row("unknown", 0.045)])
    assert [round(found["times_wan"]["fp4_scaled"], 2) for found in rows] == [0.67, 1.0, 1.33, 1.5]
    assert all(goal["met"] for goal in families.goals(rows))
    far = families.with_wan([*rows, row("Wan HuMo", 0.03), row("unknown", 0.061, kept=0.2, eight_bits=0.03)])
    assert {goal["met"] for goal in families.goals(far)} == {False}
    assert families.goals(far)[0]["measured"] < 100
