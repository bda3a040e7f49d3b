"""ComfyUI's own split of two prompts over two GPUs under the memory manager: the same picture, and no step done again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from testing import graphs, tiny
from testing.measure import relative_error
from testing.server import GraphFailedError, Server, prepare_base

from ..headless import memory_bench as bench

pytestmark = [
    pytest.mark.headless,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NEAR = 2e-2
"""A batch of two and two batches of one differ by bfloat16's rounding."""


@pytest.fixture(scope="module", params=[True, False], ids=["dynamic VRAM", "no dynamic VRAM"])
def memory(request, tmp_path_factory):
    base = prepare_base(tmp_path_factory.mktemp("several"))
    tiny.write_all(base / "models")
    (base / "custom_nodes" / "memory_faults").symlink_to(bench.FAULTS, target_is_directory=True)
    path = os.environ.get("COMFYUI_PATH") or Path.home() / "ComfyUI"
    with Server(base, path, cpu=False, dynamic_vram=request.param, name="several") as server:
        yield bench.MemoryBench(server)


def divided(seed: int, **options) -> graphs.Graph:
    """Wan behind the manager and ComfyUI's node for several GPUs."""
    graph = bench.managed(bench.wan(seed=seed, steps=3, decode=False), **options)
    node = graphs.node("MultiGPU_WorkUnits", model=["manager", 0], max_gpus=2)
    return graphs.between(graph, ["manager", 0], "gpus", node)


def test_two_gpus_give_the_picture_of_one(memory):
    one = memory.run(bench.managed(bench.wan(seed=1, steps=3, decode=False)))
    two = memory.run(divided(1))
    assert relative_error(two.tensors["latent"], one.tensors["latent"]) < NEAR


def test_a_step_that_runs_out_of_memory_ends_the_run_and_leaves_nothing_for_the_next(memory):
    expected = memory.run(divided(2)).tensors["latent"]
    fault = {"at": "call", "call": 3, "name": "several"}
    with pytest.raises(GraphFailedError, match="on one of several GPUs"):
        memory.run(divided(2, fault=fault))
    assert memory.run(divided(2)).tensors["latent"].equal(expected)
