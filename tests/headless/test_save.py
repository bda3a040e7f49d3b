"""A saved quantized model opens in stock ComfyUI with stock nodes, and gives the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowbit.ops.formats import SMALLEST
from testing import graphs, tiny
from testing.cases import CASES, in_formats
from testing.measure import relative_error
from testing.server import GraphFailedError

SEED = 1


def save(bench, graph: graphs.Graph, model: graphs.Link, name: str) -> str:
    """Saves the model at `model`; returns the name under which it lies in diffusion_models."""
    node = graphs.node("LowbitSaveQuantizedModel", model=model, filename_prefix=f"saved/{name}")
    needed = {key: graph[key] for key in ("model", "lora") if key in graph}
    bench.server.run(needed | {"save": node})
    (written,) = (bench.output / "saved").glob(f"{name}_*.safetensors")
    return shutil.move(written, bench.models / "diffusion_models" / f"saved_{name}.safetensors").name


def stored(path) -> dict:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of the stored bytes: FP8 has no equal of its own."""
    return a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))


@pytest.mark.parametrize(
    ("prefix", "part"), [("../elsewhere/model", "leads out of"), ("a_file/model", "cannot be made in")]
)
def test_a_prefix_that_cannot_be_is_one_sentence(bench, prefix, part):
    (bench.output / "a_file").write_text("no folder")
    node = graphs.node("LowbitSaveQuantizedModel", model=["model", 0], filename_prefix=prefix)
    with pytest.raises(GraphFailedError) as caught:
        bench.server.run({"model": graphs.load_diffusion_model("wan_t2v_small.safetensors"), "save": node})
    message = caught.value.exception_message
    assert prefix in message
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "format"),
    [*in_formats("wan_t2v", others=["qwen_image"]), ("wan_t2v", SMALLEST), ("qwen_image", SMALLEST)],
)
def test_saved_model_holds_the_quantized_bits_and_runs_in_stock_comfyui(bench, stock, name, format):
    folder = bench.models / "diffusion_models"
    source = Path(shutil.copy(folder / f"{name}.safetensors", folder / f"to_save_{name}.safetensors"))
    graph = CASES[name].graph(None, SEED) | {"model": graphs.load_diffusion_model(source.name, format)}
    here = bench.sample(graph)["latent"]
    saved = save(bench, graph, ["model", 0], f"{name}_{format}")
    path = folder / saved
    kind = "mixed" if format == SMALLEST else format

    (cached,) = (bench.models / "lowbit_cache").glob(f"{source.stem}.{kind}.*.safetensors")
    before, after = stored(cached), stored(path)
    quantized = {key.removesuffix(".comfy_quant") for key in before if key.endswith(".comfy_quant")}
    assert quantized
    core_formats = {before[f"{layer}.comfy_quant"].numpy().tobytes() for layer in quantized}
    assert len(core_formats) > 1 or kind != "mixed"
    for key, tensor in before.items():
        if key.endswith(".comfy_quant"):
            assert json.loads(after[key].numpy().tobytes())["format"] == json.loads(tensor.numpy().tobytes())["format"]
        elif key.rpartition(".")[0] in quantized and not key.endswith(".bias"):
            assert after[key].dtype == tensor.dtype, key
            assert same_bits(after[key].reshape(tensor.shape), tensor), key
        else:
            assert after[key].float().equal(tensor.float()), key
    assert bench.sample(graph | {"model": graphs.load_diffusion_model(saved, "none")})["latent"].equal(here)

    there = stock.sample(graph | {"model": graphs.load_diffusion_model(saved)})["latent"]
    # Stock ComfyUI multiplies in its own way: it quantizes activations to what the weights are, or not at all. In a mix
    # that is so of conditioning too.
    assert relative_error(there, here) < {"int4_convrot_fast": 0.12, SMALLEST: 0.04}.get(format, 0.01)
    for file in (source, path):
        file.unlink()


@pytest.mark.parametrize("format", ["fp8_e4m3fn_scaled", "int8_convrot_fast", "fp4_scaled"])
def test_lora_is_merged_into_the_saved_model(bench, stock, format):
    graph = graphs.lora(CASES["wan_t2v"].graph(format, SEED), "wan.safetensors", 1.0)
    with_lora = bench.sample(graph)["latent"]
    without = bench.sample(CASES["wan_t2v"].graph(format, SEED))["latent"]
    saved = save(bench, graph, ["lora", 0], f"merged_{format}")
    value = stock.sample(CASES["wan_t2v"].graph(None, SEED) | {"model": graphs.load_diffusion_model(saved)})["latent"]
    assert relative_error(value, with_lora) < relative_error(without, with_lora) / 2
    (bench.models / "diffusion_models" / saved).unlink()


def test_quantized_file_in_the_cache_opens_in_stock_comfyui_as_it_is(bench, stock):
    folder = bench.models / "diffusion_models"
    source = Path(shutil.copy(folder / "wan_t2v.safetensors", folder / "to_cache.safetensors"))
    graph = CASES["wan_t2v"].graph(None, SEED)
    graph["model"] = graphs.load_diffusion_model(source.name, "fp8_e4m3fn_scaled")
    here = bench.sample(graph)["latent"]
    (cached,) = (bench.models / "lowbit_cache").glob("to_cache.fp8_e4m3fn_scaled.*.safetensors")
    copy = Path(shutil.copy(cached, folder / "from_cache.safetensors"))
    value = stock.sample(graph | {"model": graphs.load_diffusion_model(copy.name)})["latent"]
    assert relative_error(value, here) < 1e-5
    for file in (source, copy):
        file.unlink()


def test_model_without_quantized_weights_is_saved_as_it_was(bench):
    graph = CASES["wan_t2v"].graph("none", SEED)
    saved = save(bench, graph, ["model", 0], "plain")
    path = bench.models / "diffusion_models" / saved
    written = stored(path)
    for key, tensor in tiny.wan_tensors().items():
        assert relative_error(written[key].float(), tensor.float()) == 0, key
    path.unlink()
