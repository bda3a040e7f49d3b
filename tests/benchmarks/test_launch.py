"""The benchmark of the processor's time: its goals, and that it runs where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launch
from benchmarks.shown import STAGES, by_stage

ROOT = Path(__file__).resolve().parents[2]


def row(choice: str, dynamic: bool, rows: int, call: float, bf16: float | None = None, **stages: float) -> dict:
    return {"format": choice, "dynamic": dynamic, "rows": rows, "call": call, "bf16": bf16, "stages": stages}


def test_the_goals_are_judged_on_the_worst_number_of_rows_beside_the_same_call():
    calls = (1, 25.0, 20.0), (512, 34.0, 20.0), (4096, 30.0, 17.0)
    ours = [row("int8_fast", True, *call) for call in calls] + [row("fp4_scaled_fast", True, 1, 99.0)]
    core = [row("bf16", dynamic, rows, 5.0, 5.0) for dynamic in (True, False) for rows in launch.ROWS]
    before = [row("int8_fast", True, rows, 60.0) for rows in launch.ROWS] + [row("int8_fast", False, 1, 1.0)]
    more, halved = launch.goals({"rows": ours + core, "before": before})
    assert (more["measured"], more["met"]) == (14.0, False)
    assert (halved["measured"], halved["met"]) == (pytest.approx(34 / 60), False)
    assert [goal["name"] for goal in launch.goals({"rows": ours + core})] == [more["name"]]


def test_the_table_has_every_stage_and_the_time_before():
    stages = dict.fromkeys(STAGES, 1.5)
    record = {"rows": [row("int8_fast", True, 512, 30.0, **stages)], "before": [row("int8_fast", True, 512, 60.0)]}
    (shown,) = by_stage(record)
    assert shown["before"] == 60.0
    assert all(shown[stage] == 1.5 for stage in STAGES)


@pytest.mark.usefixtures("comfyui_path")
def test_it_runs_without_a_gpu_and_says_so(tmp_path):
    out = tmp_path / "launch.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.launch",
        "--out",
        str(out),
        "--format",
        "bf16",
        "fp8_e4m3fn_scaled_fast",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["launched"] is False
    (ours,) = (row for row in record["rows"] if row["format"] != "bf16" and row["rows"] == 512)
    assert ours["stages"].keys() == set(STAGES)
    assert 0 < ours["call"] < 10_000
    assert [step["anew"] for step in record["steps"]] == [0, 0], "whatever a step launches is found in the first run"
