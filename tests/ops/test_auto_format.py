"""Claims about `auto`: which format on which GPU, for which model, in how much memory."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.auto_format import STREAMING_LIMIT, choose_format
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS
from lowbit.ops.keep_rules import parse_rules
from lowbit.ops.plan import make_plan

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


def device(capability, nbytes: int) -> DeviceInfo:
    return DeviceInfo("GPU", capability, nbytes if capability else 0)


@pytest.mark.parametrize("capability", EXPECTED)
def test_each_gpu_gets_its_format_and_a_smaller_one_when_memory_is_short(save, wan_tensors, capability):
    checkpoint = open_checkpoint(save(wan_tensors))
    roomy, short = EXPECTED[capability]
    assert choose_format(checkpoint, device(capability, GIB), None)[0] == roomy
    eight_bits = make_plan(checkpoint, FORMATS["int8"], None).nbytes_after
    fitting = int(eight_bits / STREAMING_LIMIT) + 1
    assert choose_format(checkpoint, device(capability, fitting), None)[0] == roomy
    assert choose_format(checkpoint, device(capability, fitting - 2), None)[0] == short


def test_a_text_encoder_gets_8_bit_weights_and_a_16_bit_product(save):
    names = ("shared", "encoder.block.0.layer.0.SelfAttention.q")
    checkpoint = open_checkpoint(save({f"{name}.weight": torch.randn(64, 64) for name in names}))
    assert choose_format(checkpoint, device((10, 0), GIB), None)[0] == "int8"


def test_what_cannot_be_quantized_any_further_is_left_as_it_is(save):
    stored = save({"blocks.0.q.weight": torch.randn(64, 64).to(torch.float8_e4m3fn)})
    assert choose_format(open_checkpoint(stored), device((9, 0), GIB), None)[0] == "none"
    kept = save({"blocks.0.q.weight": torch.randn(64, 64)})
    assert choose_format(open_checkpoint(kept), device((9, 0), GIB), parse_rules("*"))[0] == "none"
