"""Files that `lowbit quantize` writes open in stock ComfyUI with stock nodes, and give what the format promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.cli import main
from testing import graphs
from testing.cases import CASES, in_formats
from testing.measure import relative_error

MEASURED = json.loads((Path(__file__).parent / "tolerances.json").read_text())["largest_error"]
SEED = 1
LOADERS = {
    "wan_t2v": ("diffusion_models", lambda name: graphs.load_diffusion_model(name)),
    "qwen_image": ("diffusion_models", lambda name: graphs.load_diffusion_model(name)),
    "umt5": ("text_encoders", lambda name: graphs.load_text_encoder(name, "wan")),
    "qwen25_vl": ("text_encoders", lambda name: graphs.load_text_encoder(name, "qwen_image")),
}


def tolerance(name: str, format: str) -> float:
    """Stock ComfyUI's INT8 product quantizes activations whatever the format asks for, and its INT4 one to 4 bits."""
    measured = MEASURED[name]
    if format == "int4_convrot_fast":
        return max(1.5 * measured[format], 0.12)
    return 1.6 * max(measured[format], measured["int8_fast"] if format.startswith("int") else 0)


@pytest.mark.parametrize(("name", "format"), in_formats("wan_t2v", "umt5", others=["qwen_image", "qwen25_vl"]))
def test_file_made_on_the_command_line_runs_in_stock_comfyui(stock, name, format):
    case, (folder, load) = CASES[name], LOADERS[name]
    source = stock.models / folder / f"{name}.safetensors"
    target = source.with_name(f"made_{name}_{format}.safetensors")
    assert main(["quantize", str(source), str(target), "--format", format, "--device", "cpu"]) == 0
    try:
        value = stock.tensors(case.graph(None, SEED) | {case.loader: load(target.name)}, value=case.value)["value"]
        reference = stock.tensors(case.graph(None, SEED), value=case.value)["value"]
    finally:
        target.unlink()
    assert MEASURED[name][format] / 3 < relative_error(value, reference) < tolerance(name, format)
