"""What the README's attention tables say of a results file: which backend ran on which data, and the errors measured."""

from __future__ import annotations

import pytest

from benchmarks import readme

SHAPE = {
    "name": "a shape",
    "core_ms": 6.0,
    "backends": {
        "sageattn_3_fp8": {"error_class": "fast", "ms": 2.0, "error": {"gaussian": 0.04, "outliers": 0.07}},
        "cudnn": {"error_class": "exact", "ms": 4.0, "error": {"gaussian": 0.002, "outliers": 0.003}},
        "flash": {"why_not": "a mask"},
    },
    "budgets": {
        "fast": {
            "chosen": "sageattn_3_fp8",
            "auto_ms": 2.1,
            "speedup_over_core": 6 / 2.1,
            "errors": {"gaussian": 0.04, "outliers": 0.003},
            "picks": {"gaussian": "sageattn_3_fp8", "outliers": "cudnn"},
        },
        "exact": {
            "chosen": "cudnn",
            "auto_ms": 4.0,
            "speedup_over_core": 1.5,
            "errors": {"gaussian": 0.002, "outliers": 0.003},
            "picks": {"gaussian": "cudnn", "outliers": "cudnn"},
        },
    },
}


def test_speed_and_error_belong_to_the_backend_that_ran_on_that_data():
    assert readme.attention_choice(SHAPE, "fast") == "2.86 x sageattn_3_fp8 (4 %); outliers: 1.50 x cudnn (0.3 %)"
    assert readme.attention_choice(SHAPE, "exact") == "1.50 x cudnn (0.3 %)"


def test_auto_is_compared_with_the_best_backend_of_its_budget():
    assert readme.attention_over_best(SHAPE, "fast") == pytest.approx(1.05)
    assert readme.attention_over_best(SHAPE, "exact") == pytest.approx(1.0)


def test_the_worst_error_measured_stands_beside_the_class():
    entries = list(SHAPE["backends"].values())
    assert readme.worst_errors(entries) == "4 % / 7 %"
    assert readme.worst_errors([{"why_not": "a mask"}]) == ""
