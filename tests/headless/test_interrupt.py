"""An interrupt in the middle of a quantizing load stops it, leaves nothing half-written, and the next run goes on."""

from __future__ import annotations

import pytest

from testing import graphs, tiny
from testing.server import GraphInterruptedError

BIG = tiny.wan.WanConfig(dim=512, ffn=2048, heads=4, layers=3)


@pytest.fixture
def big_model(models):
    path = tiny.write_file(
        models / "diffusion_models" / "big.safetensors", tiny.draw(tiny.wan.shapes(BIG)), BIG.metadata()
    )
    yield path
    path.unlink()


def files(bench) -> set:
    return {path for path in (bench.models / "lowbit_cache").rglob("*") if path.is_file()}


def test_interrupt_during_a_quantizing_load_and_go_on(bench, big_model):
    loader = graphs.load_diffusion_model(big_model.name, "int4_asym_fast")
    graph = graphs.wan_t2v(loader, graphs.conditioning_random(width=256)) | {
        "dump": graphs.node("TinyDump", value=["sample", 0], name="interrupted")
    }
    before = files(bench)
    seen = []

    def interrupt(event) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "model" and not seen:
            seen.append(event["data"])
            bench.server.interrupt()

    with pytest.raises(GraphInterruptedError):
        bench.server.run(graph, on_event=interrupt)
    assert seen[0]["value"] < seen[0]["max"] / 2
    assert files(bench) == before

    progress = []
    bench.server.run(graph, on_event=lambda event: progress.append(event) if event["type"] == "progress" else None)
    done = [event["data"]["value"] / event["data"]["max"] for event in progress if event["data"]["node"] == "model"]
    assert done == sorted(done)
    assert done[0] < 0.5, "it begins anew"
    assert done[-1] == 1
    assert len(files(bench) - before) == 1


def test_interrupt_while_sampling_leaves_the_loaded_model_usable(bench, big_model):
    loader = graphs.load_diffusion_model(big_model.name, "int8")
    graph = graphs.wan_t2v(loader, graphs.conditioning_random(width=256), steps=200, frames=17)
    graph["dump"] = graphs.node("TinyDump", value=["sample", 0], name="interrupted_sampling")
    first = []

    def interrupt(event) -> None:
        if event["type"] == "progress" and event["data"]["node"] == "sample" and not first:
            first.append(event)
            bench.server.interrupt()

    with pytest.raises(GraphInterruptedError):
        bench.server.run(graph, on_event=interrupt)
    short = graphs.wan_t2v(loader, graphs.conditioning_random(width=256))
    assert bench.sample(short)["latent"].isfinite().all()
