"""Claims about writing text on a GPU in ComfyUI: the graph is the eager step bit for bit, and core's loop up to rounding."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.headless, pytest.mark.slow]

SCRIPT = "text_process.py"
FORMATS = ("none", "int8", "fp8_e4m3fn_scaled", "fp4_scaled", "int8_convrot_fast")


@pytest.mark.parametrize("name", FORMATS)
def test_a_graph_writes_what_the_eager_step_writes(run, name):
    mode, result = run
    row = result["rows"][name]
    assert row["dynamic"] is (mode == "dynamic")
    assert row["greedy_equal"]
    assert row["sampled_equal"]
    assert row["heavy_equal"]
    assert row["sampled_distinct"] > 5


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_cores_up_to_rounding(run, name):
    """bfloat16 has 8 bits; rotated weights go through another path of ours."""
    errors = run[1]["rows"][name]["logit_errors"]
    assert len(errors) == 10
    assert max(errors) < 0.04


def test_many_prompts_do_not_grow(run):
    row = run[1]["rows"]["int8"]
    assert row["grown_bytes"] < 1 << 20
    assert row["reserved_grown_bytes"] < 64 << 20
