"""The goals of several GPUs are judged on the rows they are about."""

from __future__ import annotations

from benchmarks.several_gpus import LONGEST_START, SPEED_GOALS, goals


def row(case="wan480", gpus=2, way="INT8, sequence", **values):
    return {"case": case, "gpus": gpus, "way": way, **values}


def by_name(rows):
    return {goal["name"]: goal for goal in goals(rows)}


def test_the_faster_split_of_int8_counts():
    rows = [
        row(gpus=1, seconds=2.0),
        row(speedup=1.7),
        row(way="INT8, auto", speedup=1.9),
        row(way="bf16", speedup=3.0),
    ]
    goal = by_name(rows)["wan480, INT8 weights, 2 GPUs beside one"]
    assert (goal["measured"], goal["target"], goal["met"]) == (1.9, 1.85, True)


def test_what_failed_is_a_goal_that_was_not_met():
    assert not by_name([row(failed="out of memory")])["wan480, INT8 weights, 2 GPUs beside one"]["met"]


def test_the_error_is_that_of_16_bits_and_the_start_is_beyond_the_load():
    rows = [row(error=0.01), row(way="bf16, sequence", error=5e-4, start_seconds=19.0, load_seconds=8.0)]
    found = by_name(rows)
    assert found["wan480, bf16 weights, exact attention, 2 GPUs: error beside one"]["measured"] == 0.05
    start = found["wan480, 2 GPUs: the workers' start beyond the model's load"]
    assert (start["measured"], start["target"], start["met"]) == (11.0, LONGEST_START, False)


def test_only_what_was_run_is_judged():
    assert goals([row(gpus=1, seconds=1.0)]) == []
    assert list(by_name([row(speedup=1.9)])) == ["wan480, INT8 weights, 2 GPUs beside one"]
    assert {(case, gpus) for case, gpus, _ in SPEED_GOALS} == {
        ("wan480", 2), ("wan480", 4), ("wan720", 2), ("wan720", 4), ("qwen", 2)
    }  # fmt: skip
