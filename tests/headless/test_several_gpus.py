"""Several GPUs (Lowbit) in a running ComfyUI, on two processes of the CPU: prompts in the queue share the worker, and it goes with the model."""

from __future__ import annotations

import time

import psutil
from safetensors.torch import load_file

from testing import graphs
from testing.cases import CASES
from testing.measure import relative_error

SEEDS = (71, 72)
DIVIDED = "a forward was divided"
SOON = 20.0


def divided(seed: int) -> graphs.Graph:
    graph = CASES["wan_t2v"].graph("int8", seed)
    graph = graphs.between(graph, ["model", 0], "cpus", graphs.node("TinyTwoCPUs", model=["model", 0]))
    inputs = {"gpus": "cpus", "split": "sequence", "eight_bit_exchange": False}
    return graphs.between(graph, ["cpus", 0], "several", graphs.node("LowbitSeveralGPUs", model=["cpus", 0], **inputs))


def workers(server) -> list[int]:
    """Ids of the worker processes."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child.pid for child in children if any("start_tiny_worker" in part for part in child.cmdline())]


def test_two_prompts_in_the_queue(bench):
    alone = [bench.sample(CASES["wan_t2v"].graph("int8", seed))["latent"] for seed in SEEDS]
    names = [f"several-{seed}" for seed in SEEDS]
    queued = [
        bench.server.queue(graphs.dump(divided(seed), name, latent=["sample", 0]))
        for seed, name in zip(SEEDS, names, strict=True)
    ]
    found, told = [], []
    for prompt in queued:
        bench.server.wait(prompt)
        found.append(workers(bench.server))
        told.append(bench.server.log().count(DIVIDED))
    for name, expected in zip(names, alone, strict=True):
        (latent,) = load_file(bench.output / name / "latent.safetensors").values()
        assert relative_error(latent, expected) <= 1e-5
    assert len(found[0]) == 1
    assert found[0] == found[1]
    assert 0 < told[0] < told[1]


def test_the_worker_goes_with_the_model(bench):
    bench.sample(divided(SEEDS[0]))
    (pid,) = workers(bench.server)
    bench.server.free()
    end = time.monotonic() + SOON
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
