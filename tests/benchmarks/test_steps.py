"""The benchmark of whole steps: what it writes is what the tables and goals read; on a tiny model in a real ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import steps

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
sys.argv = ["steps.py", "--out", sys.argv[1], "--model", "wan480", "--only", "stock, bf16", "auto, attention fast"]
from benchmarks import steps
from testing.tiny import wan
config = wan.WanConfig()
steps.CASES["wan480"] = lambda: steps.Case("a tiny Wan", wan.shapes(config), config.metadata(), (1, 16, 3, 8, 8), (9, 256))
steps.main()
"""


def test_speedups_are_over_the_stock_rows_of_the_same_case():
    rows = [
        {"case": "a", "contender": steps.STOCK, "seconds": 3.0},
        {"case": "a", "contender": steps.STOCK_FP8, "seconds": 2.0},
        {"case": "a", "contender": "auto, attention fast", "seconds": 1.5},
        {"case": "b", "contender": "auto, attention fast", "seconds": 1.0},
        {"case": "a", "contender": "auto", "failed": "no"},
    ]
    found = steps.with_speedups(rows)
    assert [row.get("speedup") for row in found] == [1.0, 1.5, 2.0, None, None]
    assert [row.get("speedup_over_fp8") for row in found] == [0.667, 1.0, 1.333, None, None]


def test_goals_name_contenders_that_there_are_and_are_judged_on_their_case():
    names = {contender.name for contender in (*steps.CONTENDERS, *steps.CONTENDERS_COMPILED)}
    assert {name for _, contender, beside, _ in steps.GOALS for name in (contender, beside)} <= names
    assert {case for case, *_ in steps.GOALS} <= steps.CASES.keys()
    rows = [
        {"case": "wan480", "contender": steps.STOCK, "seconds": 2.2},
        {"case": "wan480", "contender": "auto, attention fast", "seconds": 1.0},
    ]
    (goal,) = steps.goals(rows)
    assert (goal["measured"], goal["met"], goal["target"]) == (2.2, True, 2.2)


@pytest.mark.usefixtures("comfyui_path")
def test_it_runs(tmp_path):
    out = tmp_path / "steps.json"
    command = [sys.executable, "-c", RUN, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["stock, bf16", "auto, attention fast"]
    assert all(row["seconds"] > 0 and len(row["steps"]) == steps.STEPS for row in rows)
    assert rows[0]["error"] == 0
    assert 0 < rows[1]["error"] < 0.1
    assert sum(call["calls"] for call in rows[1]["attention"]) > 0
