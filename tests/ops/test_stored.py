"""Claims about files that are quantized already: every naming is found, scales stay float32, nothing is requantized."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import core_config_tensor, quantize_weight
from lowbit.ops.stored import normalize_state_dict


def layer_config(tensors: dict[str, torch.Tensor], layer: str) -> dict:
    return json.loads(tensors[f"{layer}.comfy_quant"].numpy().tobytes())


def float8(dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.randn(32, 48).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("marker", [None, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scaled_fp8_files_of_every_naming(dtype, scale_name, marker, scale_dtype):
    source = {
        "a.weight": float8(dtype),
        f"a.{scale_name}": torch.tensor([0.25], dtype=scale_dtype),
        "n.weight": torch.ones(4),
    }
    if marker is not None:
        source["scaled_fp8"] = torch.zeros(1).to(marker)
    result = normalize_state_dict(source, {})
    expected = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
    assert layer_config(result, "a")["format"] == expected
    assert result["a.weight"] is source["a.weight"]
    assert result["a.weight_scale"].dtype == torch.float32
    assert result["a.weight_scale"].item() == 0.25
    assert set(result) == {"a.weight", "a.weight_scale", "a.comfy_quant", "n.weight"}


def test_the_two_element_marker_asks_for_a_16_bit_product():
    source = {"a.weight": float8(), "a.scale_weight": torch.tensor(1.0), "scaled_fp8": torch.zeros(2)}
    assert layer_config(normalize_state_dict(source, {}), "a")["full_precision_matrix_mult"] is True
    assert "full_precision_matrix_mult" not in layer_config(normalize_state_dict(source, {}, fast=True), "a")


def test_e5m2_is_never_given_to_the_8_bit_product():
    source = {"a.weight": float8(torch.float8_e5m2), "a.scale_weight": torch.tensor(1.0)}
    assert layer_config(normalize_state_dict(source, {}, fast=True), "a")["full_precision_matrix_mult"] is True


def test_input_scales_are_carried_on_under_cores_name():
    source = {"a.weight": float8(), "a.scale_weight": torch.tensor(0.5), "a.scale_input": torch.tensor(2.0)}
    result = normalize_state_dict(source, {})
    assert result["a.input_scale"].item() == 2.0
    assert "a.scale_input" not in result


def test_a_plain_cast_gets_a_scale_of_one_and_vectors_and_convolutions_do_not():
    source = {
        "a.weight": float8(),
        "norm.weight": torch.ones(8).to(torch.float8_e4m3fn),
        "conv.weight": torch.ones(2, 2, 1, 1, 1).to(torch.float8_e4m3fn),
    }
    result = normalize_state_dict(source, {})
    assert result["a.weight_scale"].item() == 1.0
    assert set(result) == {*source, "a.weight_scale", "a.comfy_quant"}


def test_header_metadata_and_core_tensors_are_read():
    parts = quantize_weight(torch.randn(32, 256), "int8_convrot", fast=True)
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    by_metadata = {"a.weight": parts["weight"], "a.weight_scale": parts["weight_scale"]}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": config}})}
    assert layer_config(normalize_state_dict(by_metadata, metadata), "a") == config
    by_tensor = {f"a.{suffix}": tensor for suffix, tensor in parts.items()}
    assert layer_config(normalize_state_dict(by_tensor, None), "a") == config


@pytest.mark.parametrize("storage", STORAGES)
def test_cores_own_formats_are_carried_on_untouched(storage):
    parts = quantize_weight(torch.randn(32, 256), storage)
    source = {f"a.{suffix}": tensor for suffix, tensor in parts.items()}
    result = normalize_state_dict(source, {})
    assert result.keys() == source.keys()
    for name, tensor in source.items():
        if not name.endswith("comfy_quant"):
            assert result[name].shape == tensor.shape
            assert result[name].dtype == tensor.dtype


def test_per_row_fp8_scales_become_columns():
    source = {"a.weight": float8(), "a.weight_scale": torch.ones(32)}
    assert normalize_state_dict(source, {})["a.weight_scale"].shape == (32, 1)


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        (
            {"a.weight": torch.zeros(2, 2)},
            {"_quantization_metadata": "no json"},
            "_quantization_metadata cannot be read",
        ),
        ({"a.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, {}, "does not describe a quantized layer"),
        ({"a.comfy_quant": core_config_tensor({"other": 1})}, {}, "does not describe a quantized layer"),
        (
            {"a.weight": torch.zeros(2, 2), "a.comfy_quant": core_config_tensor({"format": "nvfp4"})},
            {},
            "has no 'weight_scale'",
        ),
    ],
)
def test_broken_descriptions_are_refused(tensors, metadata, reason):
    with pytest.raises(CheckpointError, match=reason):
        normalize_state_dict(tensors, metadata)


def test_a_plan_takes_stored_layers_as_they_are(save, wan_tensors):
    wan_tensors["blocks.0.ffn.0.weight"] = wan_tensors["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    wan_tensors["blocks.0.ffn.0.scale_weight"] = torch.tensor(1.0)
    plan = make_plan(open_checkpoint(save(wan_tensors)), FORMATS["int8_convrot_fast"], None)
    assert plan.layers["blocks.0.ffn.0"].action == "stored"
    assert plan.layers["blocks.1.ffn.0"].action == "quantize"
