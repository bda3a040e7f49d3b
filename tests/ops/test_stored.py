"""Claims about files that are quantized already: every naming is found, scales stay float32, nothing is requantized."""

from __future__ import annotations

import json

import pytest
import torch
from comfy_kitchen.tensor.base import LAYOUTS
from safetensors.torch import load_file

from lowbit.errors import CapabilityError, CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.layouts import register_layouts
from lowbit.ops.plan import make_plan
from lowbit.ops.plan_report import plan_report
from lowbit.ops.quantize import assemble, core_config_tensor, quantize_weight
from lowbit.ops.stored import FLOAT8_FORMATS, normalize_state_dict
from lowbit.ops.stream import quantize_checkpoint

HOPPER = DeviceInfo("NVIDIA H200", (9, 0), 140 << 30)


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


PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.", "model.")


@pytest.mark.parametrize(
    ("on_tensors", "in_header"),
    [(prefix, prefix) for prefix in PREFIXES]
    + [(prefix, "") for prefix in PREFIXES[1:]]
    + [("", prefix) for prefix in PREFIXES[1:]],
)
@pytest.mark.parametrize("storage", ["int8_convrot", "nvfp4", "mxfp8", "float8_e4m3fn", "int4_asym"])
def test_a_description_finds_its_layer_under_every_prefix(storage, on_tensors, in_header):
    parts = quantize_weight(torch.randn(32, 256), storage)
    config = {**json.loads(parts.pop("comfy_quant").numpy().tobytes()), "full_precision_matrix_mult": True}
    source = {f"{on_tensors}blocks.0.q.{suffix}": tensor for suffix, tensor in parts.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": {f"{in_header}blocks.0.q": config}})}
    assert layer_config(normalize_state_dict(source, metadata), f"{on_tensors}blocks.0.q") == config


def test_integers_beside_a_description_of_nothing_are_refused():
    parts = quantize_weight(torch.randn(32, 256), "int8_convrot")
    config = json.loads(parts.pop("comfy_quant").numpy().tobytes())
    source = {f"blocks.0.q.{suffix}": tensor for suffix, tensor in parts.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"other.q": config}})}
    with pytest.raises(CheckpointError, match=r"'blocks.0.q' is stored as integers .* describes 'other.q'"):
        normalize_state_dict(source, metadata)


def test_a_marker_speaks_for_its_own_part():
    source = {
        "text.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "text.a.weight": float8(),
        "text.a.scale_weight": torch.tensor(0.5),
        "image.scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        "image.a.weight": float8(),
        "image.a.scale_weight": torch.tensor(0.5),
    }
    result = normalize_state_dict(source, {})
    assert layer_config(result, "text.a") == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert layer_config(result, "image.a") == {"format": "float8_e4m3fn"}


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
            {
                "a.weight": torch.zeros(2, 2, dtype=torch.uint8),
                "a.comfy_quant": core_config_tensor({"format": "nvfp4"}),
            },
            {},
            "has no 'weight_scale'",
        ),
        ({"a.weight": torch.zeros(2, 2)}, {"_quantization_metadata": '{"layers": {"a": {}}}'}, "names no format"),
        ({"a.weight": torch.zeros(2, 2)}, {"_quantization_metadata": '{"layers": {"a": "x"}}'}, "names no format"),
        ({"a.weight": torch.zeros(2, 2)}, {"_quantization_metadata": "[" * 200_000}, "nested too deeply"),
        ({"a.comfy_quant": torch.tensor(list(b'["x"]'), dtype=torch.uint8)}, {}, "does not describe a quantized layer"),
        ({"a.comfy_quant": torch.tensor(list(b'"x"'), dtype=torch.uint8)}, {}, "does not describe a quantized layer"),
        ({"a.comfy_quant": core_config_tensor({"format": 8})}, {}, "does not describe a quantized layer"),
    ],
)
def test_broken_descriptions_are_refused(tensors, metadata, reason):
    with pytest.raises(CheckpointError, match=reason):
        normalize_state_dict(tensors, metadata)


def int8() -> torch.Tensor:
    return torch.randint(-127, 128, (32, 48), dtype=torch.int8)


UNKNOWN_SCALINGS = {
    "DeepSeek's block scales": ({"a.weight": float8(), "a.weight_scale_inv": torch.ones(1, 1)}, "a.weight_scale_inv"),
    "block scales": ({"a.weight": float8(), "a.weight_scale": torch.ones(2, 2)}, "a.weight_scale"),
    "a scale per column": ({"a.weight": float8(), "a.weight_scale": torch.ones(1, 48)}, "a.weight_scale"),
    "a row of scales": ({"a.weight": float8(), "a.weight_scale": torch.ones(1, 32)}, "a.weight_scale"),
    "a smoothed weight": (
        {"a.weight": float8(), "a.weight_scale": torch.tensor(1.0), "a.pre_quant_scale": torch.ones(48)},
        "a.pre_quant_scale",
    ),
    "a described layer with scales of another name": (
        {
            "a.weight": float8(),
            "a.weight_scale_inv": torch.ones(1, 1),
            "a.comfy_quant": core_config_tensor({"format": "float8_e4m3fn"}),
        },
        "a.weight_scale_inv",
    ),
    "INT8 in blocks": ({"a.weight": int8(), "a.weight_scale": torch.ones(32, 3)}, "a.weight_scale"),
    "INT8 with a zero point": (
        {"a.weight": int8(), "a.weight_scale": torch.ones(32), "a.weight_zero_point": torch.zeros(32)},
        "a.weight_zero_point",
    ),
    "INT8 without a scale": ({"a.weight": int8()}, "'a' is stored as int8"),
    "bitsandbytes": ({"a.weight": int8().view(torch.uint8), "a.weight.absmax": torch.ones(24)}, "a.weight.absmax"),
    "packed without a description": (
        {"a.weight": int8().view(torch.uint8), "a.weight_scale": torch.ones(32)},
        "'a' is stored as uint8",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_SCALINGS)
def test_a_scaling_that_core_cannot_multiply_with_is_refused_not_passed_over(case):
    tensors, named = UNKNOWN_SCALINGS[case]
    with pytest.raises(CheckpointError, match="use the 16-bit file") as raised:
        normalize_state_dict(tensors, {})
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize(
    ("core_format", "dtype"),
    [
        ("int8_tensorwise", torch.bfloat16),
        ("int8_tensorwise", torch.float8_e4m3fn),
        ("nvfp4", torch.float16),
        ("mxfp8", torch.int8),
        ("float8_e4m3fn", torch.uint8),
        ("convrot_w4a4", torch.float32),
    ],
)
def test_a_description_that_the_weight_contradicts_is_refused(core_format, dtype, in_header):
    tensors = {"a.weight": torch.ones(64, 64).to(dtype), "a.weight_scale": torch.ones(64, 1)}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": core_format}}})}
    if not in_header:
        tensors["a.comfy_quant"], metadata = core_config_tensor({"format": core_format}), {}
    with pytest.raises(CheckpointError, match=f"'a' is described as {core_format}, and its weight is stored as"):
        normalize_state_dict(tensors, metadata)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_input_s_scale_is_refused_where_core_would_pass_it_over(storage):
    parts = quantize_weight(torch.randn(256, 256), storage)
    tensors = {f"a.{suffix}": part for suffix, part in parts.items()} | {"a.pre_quant_scale": torch.rand(256)}
    if storage == "nvfp4":
        assert torch.equal(normalize_state_dict(tensors, {})["a.pre_quant_scale"], tensors["a.pre_quant_scale"])
        return
    with pytest.raises(CheckpointError, match=r"'a' is scaled by 'a.pre_quant_scale'"):
        normalize_state_dict(tensors, {})


def test_a_description_that_is_all_that_is_left_of_a_layer_is_dropped():
    left = {"b.comfy_quant": core_config_tensor({"format": "int8_tensorwise"})}
    assert set(normalize_state_dict({"a.weight": torch.randn(4, 4)} | left, {})) == {"a.weight"}


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.full((32,), 0.5), torch.full((32, 1), 0.5).bfloat16()])
def test_int8_weights_with_a_scale_per_tensor_or_row_need_no_description(scale):
    source = {"a.weight": int8(), "a.weight_scale": scale, "a.input_scale": torch.tensor(2.0)}
    result = normalize_state_dict(source, {})
    assert layer_config(result, "a") == {"format": "int8_tensorwise"}
    assert result["a.weight_scale"].dtype == torch.float32
    assert result["a.weight_scale"].shape in ((), (32, 1))
    assert "a.input_scale" not in result, "core's INT8 measures its input"
    parts = {suffix: result[f"a.{suffix}"] for suffix in ("weight", "weight_scale")}
    expected = source["a.weight"].float() * 0.5
    assert torch.equal(assemble(parts, "int8", (32, 48), torch.float32).dequantize(), expected)


@pytest.mark.parametrize(("dtype", "name"), list(FLOAT8_FORMATS.items()))
@pytest.mark.parametrize("described", ["header", "tensor"])
def test_fp8_layers_follow_their_own_dtype_whatever_a_description_says(dtype, name, described):
    source = {"a.weight": float8(dtype), "a.weight_scale": torch.tensor(1.0)}
    config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": config}})} if described == "header" else {}
    if described == "tensor":
        source["a.comfy_quant"] = core_config_tensor(config)
    assert layer_config(normalize_state_dict(source, metadata), "a") == {**config, "format": name}


def test_a_described_fp8_layer_without_a_scale_gets_one_of_one():
    source = {"a.weight": float8(), "a.comfy_quant": core_config_tensor({"format": "float8_e4m3fn"})}
    assert normalize_state_dict(source, {})["a.weight_scale"].item() == 1.0


@pytest.mark.parametrize(
    ("storage", "suffix"),
    [
        ("nvfp4", "weight_scale"),
        ("nvfp4", "weight_scale_2"),
        ("mxfp8", "weight_scale"),
        ("int8", "weight_scale"),
        ("int4_convrot", "weight_scale"),
        ("int4_asym", "weight_s_rel"),
        ("int4_asym", "weight_s_channel"),
    ],
)
@pytest.mark.parametrize("shape", [(160, 256), (64, 512)])
def test_every_scale_of_a_format_must_be_there_and_fit(storage, suffix, shape):
    parts = quantize_weight(torch.randn(shape), storage)
    source = {f"a.{part}": tensor for part, tensor in parts.items()}
    normalize_state_dict(source, {})
    scale = source.pop(f"a.{suffix}")
    with pytest.raises(CheckpointError, match=f"'a' has no '{suffix}'"):
        normalize_state_dict(source, {})
    # As many as a row too few, which a kernel would read beyond the end of.
    source[f"a.{suffix}"] = scale.reshape(-1)[:-1] if scale.numel() > 1 else scale.reshape(-1).repeat(2)
    with pytest.raises(CheckpointError, match=f"a.{suffix}' of shape .* does not fit"):
        normalize_state_dict(source, {})


def test_block_scales_in_plain_rows_are_refused():
    """Core and its kernels read cuBLAS's tiles, and would read beyond the end of these."""
    parts = quantize_weight(torch.randn(160, 96), "nvfp4")
    source = {f"a.{part}": tensor for part, tensor in parts.items()}
    source["a.weight_scale"] = torch.ones(160, 6).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="does not fit"):
        normalize_state_dict(source, {})


def test_a_format_that_is_not_ours_is_left_to_core():
    source = {"a.weight": torch.zeros(2, 2, dtype=torch.uint8), "a.comfy_quant": core_config_tensor({"format": "new"})}
    assert layer_config(normalize_state_dict(source, {}), "a") == {"format": "new"}


def test_a_format_that_the_installed_comfy_kitchen_lacks_is_said(save, wan_tensors, monkeypatch):
    register_layouts()
    monkeypatch.delitem(LAYOUTS, "AsymW4A8Int8Layout")
    checkpoint = open_checkpoint(save(wan_tensors))
    with pytest.raises(CapabilityError, match=r"comfy-kitchen cannot store weights as int4_asym: update it"):
        make_plan(checkpoint, FORMATS["int4_asym_fast"], None)
    make_plan(checkpoint, FORMATS["int8"], None)


@pytest.mark.parametrize("named", [True, False])
def test_only_a_format_that_the_user_named_decides_the_product_of_stored_layers(save, tmp_path, named):
    tensors = {"blocks.1.q.weight": torch.randn(64, 64)}
    config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    for suffix, part in quantize_weight(torch.randn(64, 64), "float8_e4m3fn").items():
        tensors[f"blocks.0.q.{suffix}"] = part
    tensors["blocks.0.q.comfy_quant"] = core_config_tensor(config)
    checkpoint = open_checkpoint(save(tensors))
    plan = make_plan(checkpoint, FORMATS["int8_convrot_fast"], None, named=named)
    quantize_checkpoint(checkpoint, plan, tmp_path / "out.safetensors")
    written = layer_config(load_file(tmp_path / "out.safetensors"), "blocks.0.q")
    assert written == ({"format": "float8_e4m3fn"} if named else config)
    report = plan_report(checkpoint, plan, HOPPER, "")
    assert ("float8_e4m3fn, fast: native" in report) is named


def test_a_plan_takes_stored_layers_as_they_are(save, wan_tensors):
    wan_tensors["blocks.0.ffn.0.weight"] = wan_tensors["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    wan_tensors["blocks.0.ffn.0.scale_weight"] = torch.tensor(1.0)
    plan = make_plan(open_checkpoint(save(wan_tensors)), FORMATS["int8_convrot_fast"], None)
    assert plan.layers["blocks.0.ffn.0"].action == "stored"
    assert plan.layers["blocks.1.ffn.0"].action == "quantize"
