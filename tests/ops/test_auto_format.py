"""Claims about `auto` and `smallest`: which formats on which GPU, for which model, in how much memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lowbit.ops.auto_format import STREAMING_LIMIT, FormatChooser
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import AUTO, FORMATS, SMALLEST
from lowbit.ops.keep_rules import parse_rules
from lowbit.ops.plan import QUANTIZE, make_plan
from lowbit.ops.sampled_errors import sampled_errors

from .conftest import wan_like

GIB = 1 << 30
EXPECTED = {
    None: ("int8_convrot_fast", "int8_convrot_fast"),
    (7, 5): ("int8_convrot_fast", "int4_asym_fast"),
    (8, 0): ("int8_convrot_fast", "int4_asym_fast"),
    (8, 6): ("int8_convrot_fast", "int4_asym_fast"),
    (8, 9): ("int8_convrot_fast", "int4_asym_fast"),
    (9, 0): ("int8_convrot_fast", "int4_asym_fast"),
    (10, 0): ("fp8_e4m3fn_scaled_fast", "fp4_scaled_fast"),
    (12, 0): ("int8_convrot_fast", "fp4_scaled_fast"),
    (12, 1): ("int8_convrot_fast", "fp4_scaled_fast"),
}


MEASURE = partial(sampled_errors, device="cpu", folder=None)


def device(capability, nbytes: int) -> DeviceInfo:
    return DeviceInfo("GPU", capability, nbytes if capability else 0)


def chosen(checkpoint, device: DeviceInfo, rules=None, name: str = AUTO):
    return FormatChooser(checkpoint, device, rules, MEASURE).choose(name)


def formats_of(plan) -> set[str]:
    return {layer.weight_format for layer in plan.layers.values() if layer.action == QUANTIZE}


@pytest.mark.parametrize("capability", EXPECTED)
def test_each_gpu_gets_its_format_and_a_smaller_one_when_memory_is_short(save, wan_tensors, capability):
    checkpoint = open_checkpoint(save(wan_tensors))
    roomy, short = EXPECTED[capability]
    assert chosen(checkpoint, device(capability, GIB)).name == roomy
    eight_bits = make_plan(checkpoint, FORMATS["int8"], None).nbytes_after
    fitting = int(eight_bits / STREAMING_LIMIT) + 1
    assert chosen(checkpoint, device(capability, fitting)).plan == make_plan(
        checkpoint, FORMATS[roomy], None, named=False
    )
    found = chosen(checkpoint, device(capability, fitting - 2))
    assert found.name.startswith(short)
    assert "over 1.5 times" in found.reason or short == roomy


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize("part", [0.4, 0.6])
def test_where_memory_is_short_4_bits_go_where_they_cost_least(save, capability, part):
    """Never larger than the GPU, or than 4 bits alone are, and never less exact than those."""
    checkpoint = open_checkpoint(save(wan_like(blocks=4)))
    eight_bits = make_plan(checkpoint, FORMATS["int8"], None).nbytes_after
    gpu = device(capability, int(part * eight_bits))
    found, plans = chosen(checkpoint, gpu), FormatChooser(checkpoint, gpu, None, MEASURE).two_plans
    assert found.plan.nbytes_after <= max(gpu.memory_bytes, plans.four_bits.nbytes_after)
    assert plans.error(found.plan) < plans.error(plans.four_bits)
    assert {"int4_asym_fast", "int8_convrot_fast"} <= formats_of(found.plan)
    assert found.name == "int4_asym_fast and int8_convrot_fast"


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_where_the_4_bit_product_is_the_faster_one_auto_mixes_nothing_in(save, wan_tensors, capability):
    checkpoint = open_checkpoint(save(wan_tensors))
    found = chosen(checkpoint, device(capability, 1 << 16))
    assert found.plan == make_plan(checkpoint, FORMATS["fp4_scaled_fast"], None, named=False)


@pytest.mark.parametrize("capability", EXPECTED)
def test_smallest_takes_no_more_than_4_bits_and_is_more_exact(save, capability):
    checkpoint = open_checkpoint(save(wan_like(blocks=4)))
    gpu = device(capability, GIB)
    found, plans = chosen(checkpoint, gpu, name=SMALLEST), FormatChooser(checkpoint, gpu, None, MEASURE).two_plans
    assert found.plan.nbytes_after <= plans.four_bits.nbytes_after
    assert plans.error(found.plan) < 0.8 * plans.error(plans.four_bits)


def test_a_text_encoder_gets_8_bit_weights_and_a_16_bit_product(save):
    names = ("shared", "encoder.block.0.layer.0.SelfAttention.q")
    checkpoint = open_checkpoint(save({f"{name}.weight": torch.randn(64, 64) for name in names}))
    assert chosen(checkpoint, device((10, 0), GIB)).name == "int8"


def test_what_cannot_be_quantized_any_further_is_left_as_it_is(save):
    stored = save({"blocks.0.q.weight": torch.randn(64, 64).to(torch.float8_e4m3fn)})
    assert chosen(open_checkpoint(stored), device((9, 0), GIB)).name == "none"
    kept = save({"blocks.0.q.weight": torch.randn(64, 64)})
    assert chosen(open_checkpoint(kept), device((9, 0), GIB), parse_rules("*")).name == "none"
