"""What a plan decides from dtypes, shapes and the format asked for."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.keep_rules import QUANTIZE, parse_rules
from lowbit.ops.plan import make_plan

FLUX_LIKE = {
    "img_in.weight": (512, 64),
    "double_blocks.0.img_mod.lin.weight": (1536, 512),
    "double_blocks.0.img_attn.qkv.weight": (1536, 512),
    "double_blocks.0.img_mlp.0.weight": (2048, 512),
}


def layers(save, tensors, format_name, rules="auto"):
    checkpoint = open_checkpoint(save(tensors))
    return make_plan(checkpoint, FORMATS[format_name], parse_rules(rules)).layers


def flux_like(dtype=torch.bfloat16):
    return {name: torch.randn(shape).to(dtype) for name, shape in FLUX_LIKE.items()}


def test_what_a_16_bit_file_holds_in_32_bits_stays_so(save):
    tensors = flux_like()
    tensors["double_blocks.0.img_attn.qkv.weight"] = tensors["double_blocks.0.img_attn.qkv.weight"].float()
    wide = layers(save, tensors, "fp4_scaled")["double_blocks.0.img_attn.qkv"]
    assert (wide.action, wide.nbytes_after) == ("keep", wide.nbytes_before)
    asked = layers(save, tensors, "fp4_scaled", "!img_attn\nauto")["double_blocks.0.img_attn.qkv"]
    assert (asked.action, asked.storage) == (QUANTIZE, "nvfp4")


def test_a_file_in_32_bits_is_quantized(save):
    found = layers(save, flux_like(torch.float32), "int8")
    assert {name for name, layer in found.items() if layer.action == QUANTIZE} == {
        name.removesuffix(".weight") for name in FLUX_LIKE
    } - {"img_in"}


@pytest.mark.parametrize("name", FORMATS)
def test_large_modulation_has_8_bits_whatever_the_format(save, name):
    row = FORMATS[name]
    found = layers(save, flux_like(), name)
    bits = STORAGES[row.storage].bits
    assert STORAGES[found["double_blocks.0.img_mlp.0"].storage].bits == bits
    modulation = found["double_blocks.0.img_mod.lin"]
    assert STORAGES[modulation.storage].bits == 8
    assert modulation.weight_format == (name if bits == 8 else "int8")
