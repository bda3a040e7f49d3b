"""The LoRA benchmark merges what ComfyUI would add, and judges the worst format."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import lora


def test_the_merged_file_has_the_update_of_every_linear_in_its_weights(tmp_path):
    shapes = {"blocks.0.ffn.0.weight": (48, 32), "blocks.0.norm.weight": (32,), "head.head.weight": (8, 32)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    added = lora.write_lora(tmp_path / "lora.safetensors", shapes)
    merged = load_file(lora.write_merged(tmp_path / "merged.safetensors", tmp_path / "model.safetensors", added, 0.5))
    factors = load_file(added)
    layer = "diffusion_model.blocks.0.ffn.0"
    assert {*factors} == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    changed = merged["blocks.0.ffn.0.weight"] - weights["blocks.0.ffn.0.weight"]
    torch.testing.assert_close(changed, 0.5 * factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"])
    for name in ("blocks.0.norm.weight", "head.head.weight"):
        assert torch.equal(merged[name], weights[name])


def test_the_worst_format_counts():
    (goal,) = lora.goals({"a": {"merged": 0.02, "here": 0.021}, "b": {"merged": 0.02, "here": 0.03}})
    assert goal["measured"] == pytest.approx(1.5)
    assert not goal["met"]
