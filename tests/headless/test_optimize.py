"""The one node behind every kind of loader: it gives what the single nodes give, and says what it did."""

from __future__ import annotations

import pytest

from testing import graphs
from testing.cases import CASES, UMT5
from testing.measure import relative_error

SEED = 1
NAME = "wan_t2v.safetensors"
FORMAT_OF_PRESET = {
    "balanced": "int8_tensorwise",
    "fastest": "int8_tensorwise",
    "most exact": "",
    "smallest": "asym_w4a8_int8 int8_tensorwise",
}
"""Core's names of the formats that a CPU gets."""


def optimized(graph: graphs.Graph, preset: str = "balanced", **links: graphs.Link) -> graphs.Graph:
    """The graph with the node behind its loader."""
    return graphs.between(graph, ["model", 0], "optimize", optimize(["model", 0], preset, **links))


def optimize(model: graphs.Link, preset: str = "balanced", **links: graphs.Link) -> dict:
    return graphs.node("LowbitOptimize", model=model, preset=preset, **links)


def wan(format: str | None = None) -> graphs.Graph:
    return CASES["wan_t2v"].graph(format, SEED)


def lines_of(bench, graph: graphs.Graph) -> list[str]:
    """The lines on the node, which it shows when it is not answered from the cache."""
    bench.server.free()
    result = bench.server.run(graphs.dump(graph, "optimize", latent=["sample", 0]))
    return result.outputs["optimize"]["text"][0].splitlines()


@pytest.mark.parametrize("name", ["wan_t2v", "qwen_image"])
def test_it_gives_what_the_single_nodes_give(bench, name):
    graph = CASES[name].graph(None, SEED)
    loaded = CASES[name].graph("auto", SEED)
    attention = graphs.node("LowbitAttention", model=["model", 0], **graphs.ATTENTION)
    memory = graphs.node("LowbitMemoryManager", model=["attention", 0], **graphs.MEMORY_MANAGER)
    single = graphs.between(loaded, ["model", 0], "memory", memory) | {"attention": attention}
    assert bench.sample(optimized(graph))["latent"].equal(bench.sample(single)["latent"])


@pytest.mark.parametrize("preset", FORMAT_OF_PRESET)
def test_a_preset_stores_the_weights_as_its_row_says(bench, preset):
    graph = optimized(wan(), preset)
    layers = bench.facts(graph, ["optimize", 0])["layers"].values()
    formats = {layer["format"] for layer in layers if layer["weight"] == "QuantizedTensor"}
    assert formats == set(FORMAT_OF_PRESET[preset].split())
    error = relative_error(bench.sample(graph)["latent"], bench.sample(wan())["latent"])
    assert error == 0 if preset == "most exact" else 0 < error < 0.15


def test_quantizing_streams_from_the_loaders_file(bench):
    """The quantized file is the one that the pack's own loader made of the same file."""
    bench.sample(wan("auto"))
    folder = bench.models / "lowbit_cache"
    before = {path.name for path in folder.glob("*.safetensors")}
    bench.server.free()
    bench.sample(optimized(wan()))
    assert {path.name for path in folder.glob("*.safetensors")} == before


@pytest.mark.parametrize("preset", ["balanced", "smallest"])
def test_a_model_that_the_packs_loader_quantized_keeps_its_weights(bench, preset):
    kept = graphs.load_diffusion_model(NAME, "fp8_e4m3fn_scaled", keep_rules="blocks.0.*\nauto")
    graph = wan("fp8_e4m3fn_scaled") | {"model": kept}
    assert (
        bench.facts(optimized(graph, preset), ["optimize", 0])["layers"] == bench.facts(graph, ["model", 0])["layers"]
    )
    weights = lines_of(bench, optimized(graph, preset))[0]
    assert "left as they are" in weights
    assert "quantized already" in weights


def test_a_model_that_the_packs_loader_left_in_16_bits_is_quantized(bench):
    assert bench.sample(optimized(wan("none")))["latent"].equal(bench.sample(optimized(wan()))["latent"])


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_lora_works_on_either_side(bench, before):
    plain = bench.sample(graphs.lora(wan(), "wan.safetensors"))["latent"]
    if before:
        graph = graphs.lora(wan(), "wan.safetensors")
        graph = graphs.between(graph, ["lora", 0], "optimize", optimize(["lora", 0]))
    else:
        graph = graphs.lora(wan(), "wan.safetensors")
        graph["lora"]["inputs"]["model"] = ["optimize", 0]
        graph["optimize"] = optimize(["model", 0])
    patched = bench.sample(graph)["latent"]
    assert relative_error(patched, plain) < 0.03
    assert relative_error(patched, bench.sample(optimized(wan()))["latent"]) > 0.03


def test_behind_another_one_it_changes_nothing_more(bench):
    once = optimized(wan())
    twice = graphs.between(once, ["optimize", 0], "again", optimize(["optimize", 0]))
    assert bench.sample(twice)["latent"].equal(bench.sample(once)["latent"])


def test_text_encoder_and_vae_pass_through_it(bench):
    graph = graphs.wan_t2v(graphs.load_diffusion_model(NAME), UMT5, seed=SEED) | graphs.decode()
    managed = optimized(graph, clip=["clip", 0], vae=["vae", 0])
    for key, name, slot in (("positive", "clip", 1), ("negative", "clip", 1), ("images", "vae", 2)):
        managed[key] = managed[key] | {"inputs": managed[key]["inputs"] | {name: ["optimize", slot]}}
    ours, theirs = bench.sample(managed), bench.sample(graph)
    assert relative_error(ours["image"], theirs["image"]) < 0.03


def test_the_node_says_in_three_lines_what_it_did(bench):
    weights, attention, memory = lines_of(bench, optimized(wan()))
    facts = {key: bench.facts(optimized(wan()), [key, 0])["bytes"] for key in ("model", "optimize")}
    assert facts["optimize"] < 0.7 * facts["model"]
    before, after = (float(weights.split(part)[1].split(" MiB")[0]) for part in ("Weights: ", "-> "))
    size = (bench.models / "diffusion_models" / NAME).stat().st_size / 2**20
    assert before == pytest.approx(size, abs=0.06)  # as written, to a tenth
    assert after < 0.7 * before
    assert "int8_convrot_fast" in weights
    assert "no GPU" in attention
    assert "policy auto" in memory
