"""What a plan decides from dtypes, shapes and the format asked for."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.keep_rules import QUANTIZE, parse_rules
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import quantize_weight
from lowbit.ops.stream import quantize_checkpoint

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


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_quantized_file_keeps_is_kept_when_the_format_is_asked_for_again(save, tmp_path, name):
    """Its packed weights have half of their columns: what stands beside them is no larger a part of the model for that."""
    tensors = {f"blocks.{number}.ffn.weight": torch.randn(256, 256).bfloat16() for number in range(14)}
    tensors |= {"head.weight": torch.randn(256, 256).bfloat16()}
    checkpoint = open_checkpoint(save(tensors))
    plan = make_plan(checkpoint, FORMATS[name], None)
    assert (plan.layers["head"].action, plan.layers["blocks.0.ffn"].action) == ("keep", QUANTIZE)
    quantize_checkpoint(checkpoint, plan, tmp_path / "made.safetensors")
    again = make_plan(open_checkpoint(tmp_path / "made.safetensors"), FORMATS[name], None)
    assert {layer.action for layer in again.layers.values()} == {"keep", "stored"}


@pytest.mark.parametrize("storage", ["nvfp4", "int4_asym", "int4_convrot", "int8"])
def test_what_is_in_32_bits_beside_packed_weights_stays_so(save, storage):
    tensors = {}
    for number in range(4):
        parts = quantize_weight(torch.randn(256, 256), storage)
        tensors |= {f"blocks.{number}.q.{suffix}": part for suffix, part in parts.items()}
    tensors |= {f"blocks.{number}.k.weight": torch.randn(256, 256) for number in range(3)}
    found = layers(save, tensors, "fp4_scaled")
    assert found["blocks.0.k"].action == "keep"
