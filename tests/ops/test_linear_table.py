"""The table that chooses a path for each call, and the sentence that says how a layout runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ops.linear_describe import describe_linear
from lowbit.ops.linear_table import PATHS, RULES, Gpu, choose_path
from lowbit.ops.linear_weight import LAYOUT_KINDS

KINDS = sorted({kind for rule in RULES for kind in rule.kinds})
CAPABILITIES = [(0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    fast=st.booleans(),
    rows=st.integers(1, 100_000),
    n=st.integers(1, 20_000),
    k=st.integers(1, 20_000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    cc=st.sampled_from(CAPABILITIES),
    triton=st.booleans(),
    kitchen=st.booleans(),
    corrected=st.booleans(),
)
def test_every_call_has_a_path(kind, fast, rows, n, k, dtype, cc, triton, kitchen, corrected):
    path = choose_path(kind, fast, rows, n, k, dtype, Gpu(cc, triton, kitchen), corrected)
    assert path in PATHS
    if cc < (8, 9):
        assert path != "fp8_rows"
    if not fast:
        assert path not in ("fp8_rows", "int8_rows", "kitchen")


@pytest.mark.parametrize(
    ("layout", "fast", "cc", "support"),
    [
        ("TensorCoreFP8E4M3Layout", True, (9, 0), "native"),
        ("TensorCoreFP8E4M3Layout", True, (8, 6), "emulated"),
        ("TensorCoreFP8E4M3Layout", False, (8, 6), "native"),
        ("TensorWiseINT8Layout", True, (8, 6), "native"),
        ("TensorCoreNVFP4Layout", True, (12, 0), "native"),
        ("TensorCoreNVFP4Layout", True, (9, 0), "fallback"),
        ("TensorCoreNVFP4Layout", True, (8, 6), "emulated"),
        ("TensorCoreMXFP8Layout", True, (8, 9), "fallback"),
        ("AsymW4A8Int8Layout", True, None, "emulated"),
        # comfy-kitchen's W4A8 kernels, CUDA's and Triton's, begin at compute capability 8.0.
        ("AsymW4A8Int8Layout", True, (7, 5), "emulated"),
        ("TensorCoreConvRotW4A4Layout", True, (7, 5), "native"),
    ],
)
def test_description(layout, fast, cc, support):
    description = describe_linear(layout, fast=fast, cc=cc, triton=True)
    assert description.support == support
    assert description.path in PATHS
    assert str(description).startswith(support)


def test_every_layout_is_described():
    for layout in LAYOUT_KINDS:
        for cc in CAPABILITIES[1:]:
            for fast in (False, True):
                assert describe_linear(layout, fast=fast, cc=cc, triton=False).sentence


def test_a_path_can_be_forced():
    script = """
import torch
from lowbit.ops.linear_table import Gpu, choose_path
gpu = Gpu((9, 0), True, False)
assert choose_path("fp8", True, 4096, 512, 512, torch.bfloat16, gpu) == "scratch"
assert choose_path("int4_codebook", True, 1, 512, 512, torch.bfloat16, gpu, True) == "reference"
"""
    environment = {"LOWBIT_LINEAR_PATH": "scratch", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("cc", [(8, 6), (10, 0), (12, 0)])
@pytest.mark.parametrize(("kind", "multiple"), [("int8", 16), ("nvfp4", 32), ("mxfp8", 32)])
def test_kitchen_takes_only_sizes_it_can(cc, kind, multiple):
    gpu = Gpu(cc, True, True)
    for n, k in ((multiple * 4, multiple * 4 + 8), (multiple * 4 + 8, multiple * 4)):
        assert choose_path(kind, True, 100, n, k, torch.bfloat16, gpu) != "kitchen"
