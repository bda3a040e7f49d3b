"""LoraLoaderModelOnly on every format: the delta survives quantization, and a strength changes nothing but itself."""

from __future__ import annotations

import functools

import pytest
import torch

from lowbit.ops.formats import FORMATS, SMALLEST
from testing import graphs
from testing.cases import CASES, in_formats
from testing.measure import relative_error

LORAS = {"wan_t2v": "wan.safetensors", "qwen_image": "qwen_image.safetensors"}
SEED = 1


def run(bench, name: str, format: str | None, strength: float | None) -> torch.Tensor:
    """The latent with or (strength None) without the LoRA."""
    graph = CASES[name].graph(format, SEED)
    return bench.sample(graph if strength is None else graphs.lora(graph, LORAS[name], strength))["latent"]


@pytest.fixture(scope="module")
def latent(bench):
    """`run`, once for each of its arguments: a latent is compared with many."""
    return functools.cache(functools.partial(run, bench))


@pytest.mark.parametrize(("name", "format"), in_formats("wan_t2v", others=["qwen_image"]))
def test_lora_delta_survives_quantization(latent, name, format):
    delta = latent(name, format, 1.0) - latent(name, format, None)
    expected = latent(name, None, 1.0) - latent(name, None, None)
    # The quantization error of the patched weight differs from that of the unpatched one, and both are in the delta.
    noise = relative_error(latent(name, format, None), latent(name, None, None))
    change = float(expected.norm() / latent(name, None, None).norm())
    assert relative_error(delta, expected) < 0.05 + 2 * noise / change
    cosine = float((delta * expected).sum() / (delta.norm() * expected.norm()))
    assert cosine > 0.75


@pytest.mark.parametrize("format", [*FORMATS, SMALLEST])
def test_result_with_lora_is_near_bf16_with_lora(latent, format):
    plain = relative_error(latent("wan_t2v", format, None), latent("wan_t2v", None, None))
    patched = relative_error(latent("wan_t2v", format, 1.0), latent("wan_t2v", None, 1.0))
    assert patched < 1.25 * plain


@pytest.mark.parametrize("format", ["fp8_e4m3fn_scaled", "int8_convrot_fast", "fp4_scaled", "int4_asym_fast", SMALLEST])
def test_taking_the_lora_off_gives_the_first_bits_back(bench, format):
    bench.server.free()
    before = run(bench, "wan_t2v", format, None)
    for strength in (1.0, 0.5, -1.0):
        assert not run(bench, "wan_t2v", format, strength).equal(before)
    graph = CASES["wan_t2v"].graph(format, SEED)
    # A strength of zero is another graph for ComfyUI's cache, so that the model really runs again.
    assert bench.sample(graphs.lora(graph, LORAS["wan_t2v"], 0.0))["latent"].equal(before)


def test_changing_a_strength_does_not_load_the_model_again(bench):
    graph = CASES["wan_t2v"].graph("int8", SEED)
    bench.server.run(graphs.dump(graphs.lora(graph, LORAS["wan_t2v"], 0.3), "strength", latent=["sample", 0]))
    result = bench.server.run(graphs.dump(graphs.lora(graph, LORAS["wan_t2v"], 0.6), "strength", latent=["sample", 0]))
    cached = {node for event in result.events if event["type"] == "execution_cached" for node in event["data"]["nodes"]}
    executed = {event["data"]["node"] for event in result.events if event["type"] == "executing"}
    assert "model" in cached
    assert "model" not in executed


def test_lora_under_the_quantizing_node_stays_on_the_model(bench, latent):
    graph = CASES["wan_t2v"].graph("int8", SEED)
    expected = latent("wan_t2v", "int8", 1.0)
    under = graphs.lora(graph | {"model": graph["model"]}, LORAS["wan_t2v"], 1.0)
    under["core"] = graphs.load_diffusion_model("wan_t2v.safetensors")
    under["lora"]["inputs"]["model"] = ["core", 0]
    under["model"] = graphs.node(
        "LowbitQuantizeModel",
        model=["lora", 0],
        format="int8",
        keep_rules="auto",
        dry_run=False,
        keep_quantized_file=True,
    )
    under["sample"]["inputs"]["model"] = ["model", 0]
    value = bench.sample(under)["latent"]
    assert relative_error(value, expected) < 0.02
    assert relative_error(value, latent("wan_t2v", "int8", None)) > 0.03
