"""The attention node's dispatcher in a real ComfyUI on this GPU, with dynamic VRAM on and off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("attention_process.py")
NEAR = {"exact": 0.02, "comfy_kitchen_int8": 0.1}


@pytest.fixture(scope="module", params=[[], ["--disable-dynamic-vram"]], ids=["dynamic VRAM", "no dynamic VRAM"])
def result(request, tmp_path_factory, comfyui_path):
    """What the script wrote."""
    out = tmp_path_factory.mktemp("attention") / "out.json"
    environment = os.environ | {"COMFYUI_PATH": str(comfyui_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), *request.param], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(out.read_text())


def test_results_are_near_cores(result):
    for name, row in result["rows"].items():
        assert max(row["errors"]) < NEAR.get(name, 0.05), name


def test_every_call_is_counted_and_self_attention_is_timed(result):
    for name, row in result["rows"].items():
        report = row["report"]
        # two runs of two steps of four blocks of a self and a cross attention, positive and negative in one batch or alone
        assert sum(report["calls_by_backend"].values()) in (32, 64), name
        assert report["sampling_runs"] == 2
        # On tensors this small ComfyUI's own attention may be the faster one.
        assert not report["struck_off"], name
        assert any(call["ms_per_call"] for call in report["calls"] if call["q_len"] == call["kv_len"] == 9216)


def test_exact_steps_are_exact(result):
    calls = result["rows"]["fast, last step exact"]["report"]["calls"]
    exact = sum(call["calls"] for call in calls if call["budget"] == "exact")
    assert exact == sum(call["calls"] for call in calls) / 2


def test_fp8_weights_are_paired_where_the_kernel_is_there(result):
    report = result["rows"]["fp8 weights"]["report"]
    if not report["paired"]:
        pytest.skip("no FP8 attention kernel for this GPU is installed")
    assert {"lowbit_int8_fp8", "lowbit_int8_fp16"} <= set(report["paired"])
