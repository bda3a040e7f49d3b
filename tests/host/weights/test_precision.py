"""A 16-bit product stays one: text encoders under either patcher, feed-forwards that core would multiply itself."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.quantize import quantize_weight

FAST = [name for name, row in FORMATS.items() if row.fast]


def linear(host, name: str, rows: int = 64, columns: int = 256, **options):
    """A Linear as core builds it, holding a weight in this format, multiplying through the pack."""
    import comfy.ops

    row = FORMATS[name]
    module = comfy.ops.mixed_precision_ops({}, torch.float32, **options).Linear(columns, rows, bias=False)
    module.load_state_dict(quantize_weight(torch.randn(rows, columns), row.storage, fast=row.fast))
    model = torch.nn.Sequential(module)
    host.operations.adopt_quantized_linears(model)
    assert isinstance(model[0], host.operations.QuantizedLinear)
    return model[0]


@pytest.mark.parametrize("name", FAST)
def test_activations_stay_in_16_bits_where_core_builds_a_model_so(host, name):
    """Dynamic VRAM leaves a module's flags as they were built; only the legacy patcher adds one of its own."""
    assert linear(host, name).fast
    assert not linear(host, name, full_precision_mm=True).fast


@pytest.mark.parametrize("name", FAST)
def test_a_format_that_core_emulates_may_still_be_fast_here(host, name):
    core_format = STORAGES[FORMATS[name].storage].core_format
    assert linear(host, name, disabled={core_format}).fast


@pytest.mark.parametrize("name", FAST)
def test_every_linear_of_a_text_encoder_multiplies_in_16_bits_before_and_after_the_patcher_loads_it(host, umt5, name):
    clip = umt5(name)
    linears = [m for m in clip.cond_stage_model.modules() if isinstance(m, host.operations.QuantizedLinear)]
    assert len(linears) >= 14
    assert not any(module.fast for module in linears)
    clip.load_model()
    assert not any(module.fast for module in linears)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("name", ["int8", "int8_fast", "fp8_e4m3fn_scaled"])
def test_core_functions_that_end_an_mlp_go_through_our_product(host, name, activation):
    """Core's own INT8 path would quantize the activations of `int8`, whose product is 16-bit."""
    import comfy.ops

    host.feed_forward.route_input_activations()
    ours = linear(host, name)
    x = torch.randn(5, 256 * (2 if activation == "swiglu" else 1))
    hidden = comfy.ops.INPUT_ACT_EAGER[activation](x.clone())
    expected = ours(hidden)
    assert torch.allclose(comfy.ops.linear_input_act(ours, x, activation), expected, rtol=1e-3, atol=1e-3)
    if name == "int8":
        exact = hidden @ ours.weight.dequantize().t()
        assert torch.allclose(expected, exact, rtol=1e-4, atol=1e-3)


def test_linears_of_core_keep_cores_function(host, monkeypatch):
    import comfy.ops

    calls = []

    def core(linear, x, input_act):
        calls.append((linear, x, input_act))

    monkeypatch.setattr(comfy.ops, "linear_input_act", core)
    host.feed_forward.route_input_activations()
    assert comfy.ops.linear_input_act is not core
    host.feed_forward.route_input_activations()
    plain, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    comfy.ops.linear_input_act(plain, x, "gelu_tanh")
    assert calls == [(plain, x, "gelu_tanh")]


def test_loading_a_quantized_model_routes_cores_function(host, monkeypatch):
    import comfy.ops

    def never(linear, x, input_act):
        pytest.fail("core multiplied a weight of ours")

    monkeypatch.setattr(comfy.ops, "linear_input_act", never)
    ours = torch.nn.Sequential(linear(host, "int8"))
    host.loading.take_over(ours)
    comfy.ops.linear_input_act(ours[0], torch.randn(2, 256), "gelu_tanh")


def test_a_bank_of_experts_is_left_to_core(host):
    import comfy.ops

    parts = [quantize_weight(torch.randn(64, 128), "float8_e4m3fn") for _ in range(2)]
    bank = comfy.ops.mixed_precision_ops({}, torch.float32).MoEExperts(2, 128, 64, bias=False)
    config = {"format": "float8_e4m3fn", "num_experts": 2}
    bank.load_state_dict(
        {
            "weight": torch.stack([part["weight"] for part in parts]),
            "weight_scale": torch.stack([part["weight_scale"] for part in parts]),
            "comfy_quant": torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8),
        }
    )
    kind = type(bank)
    assert host.operations.adopt_quantized_linears(torch.nn.Sequential(bank)) == 0
    assert type(bank) is kind
