"""diffusers' Wan by two processes of `torchrun` is Wan by one, in every process, with quantized weights too; on two GPUs as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="need diffusers")

EXACT = {"cpu": 1e-5, "cuda": 5e-3}
"""float32 on a CPU, bfloat16 on GPUs."""
FORMAT_NOISE = 0.02
"""Activations in 8 bits are rounded the other way now and then."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("need two NVIDIA GPUs")
    return request.param


@pytest.fixture(scope="module")
def results(device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    script = Path(__file__).with_name("divided_model_process.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    subprocess.run([*torchrun, str(script), str(folder)], check=True, timeout=300, env=environment)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_process_gets_the_result_of_one(device, results):
    for result in results:
        assert result["errors"]
        for name, errors in result["errors"].items():
            assert max(errors) <= (FORMAT_NOISE if "fast" in name else EXACT[device]), name


def test_each_has_its_part_of_the_tokens(results):
    first, second = (result["lengths"][:2] for result in results)
    assert first == [18, 18]
    assert second == [27, 27]


def test_a_forward_of_fewer_tokens_than_processes_is_made_whole_and_says_so(results):
    for result in results:
        assert result["lengths"][6:8] == [1, 1]
        assert ["fewer tokens than there are GPUs" in sentence for sentence in result["said"]] == [True] * 2


def test_attention_that_would_see_a_part_of_the_tokens_is_refused(results):
    for result in results:
        raised, modes = result["Foreign"]
        assert raised.startswith("RuntimeError: WanAttention does not attend by scaled_dot_product_attention")
        assert modes == 0


def test_an_error_in_attention_is_its_own(results):
    assert [result["Broken"] for result in results] == [["KeyError: 'mine'", 0]] * 2


def test_another_model_is_refused_by_name():
    from lowbit.attention.divided_model import divide_tokens

    with pytest.raises(TypeError, match="tokens of a Linear cannot be divided: only those of WanTransformer3DModel"):
        divide_tokens(torch.nn.Linear(2, 2))
