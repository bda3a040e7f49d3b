"""Layers as other tools store them are decoded on a GPU to what a CPU makes of the same file, bit for bit where no sum is taken."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.ops import foreign_decode
from lowbit.ops.checkpoint import Checkpoint, decoded, open_checkpoint
from lowbit.ops.plan import make_plan
from lowbit.ops.stream import quantize_checkpoint
from testing.tiny import nunchaku_files
from testing.tiny.foreign_files import SCHEMES, four_bit, gptq, packed_integers, stored_as
from testing.tiny.tensors import Tensors

LAYER = "transformer_blocks.0.attn.to_out.0"
MODULATION = "transformer_blocks.0.img_mod.1"
BEHIND_GELU = "transformer_blocks.0.img_mlp.net.2"
ROUNDED = 2**-22
"""Of the largest: CUDA divides by a number as it multiplies by its inverse."""
SUMMED = 1e-5
"""Of the largest: a sum in another order."""
SIZES = ((1, 2), (37, 3), (129, 5))
"""Rows and columns, in what a scheme has them in multiples of."""


def opened(tmp_path, layers: Mapping[str, Tensors]) -> Checkpoint:
    """A file with these layers' tensors."""
    tensors = {f"{layer}.{suffix}": part for layer, parts in layers.items() for suffix, part in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    return open_checkpoint(tmp_path / "theirs.safetensors")


def check(checkpoint: Checkpoint, name: str, bound: float) -> torch.Tensor:
    """Decodes a tensor on both; 0 is equal bits. Returns the CPU's."""
    entry = checkpoint.entries[name]
    assert entry.decoded_from
    wanted = decoded(entry, checkpoint.read_stored(name))
    found = decoded(entry, checkpoint.read_stored(name, "cuda"))
    assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, wanted.shape)
    if bound:
        assert (found.cpu() - wanted).abs().max() <= bound * wanted.abs().max()
    else:
        assert torch.equal(found.cpu().view(torch.int32), wanted.view(torch.int32))
    return wanted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_decoded_to_what_the_cpu_makes_of_it(tmp_path, monkeypatch, scheme, size):
    monkeypatch.setattr(foreign_decode, "_CHUNK", 1000)
    row = SCHEMES[scheme]
    rows, columns = size[0] * row.rows, size[1] * row.columns
    if row.rows == row.columns == 1:
        # One column, or one row, has the scale that core multiplies with.
        rows, columns = rows + 1, columns * 77 + 100
    torch.manual_seed(zlib.crc32(f"{scheme} {size}".encode()))
    parts, exact = row.store(torch.randn(rows, columns))
    weight = check(opened(tmp_path, {LAYER: parts}), f"{LAYER}.weight", ROUNDED if scheme == "llm.int8" else 0)
    assert (weight.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("less", [0, 24])
@pytest.mark.parametrize(
    "store", [gptq(4, 128), gptq(8, 128), packed_integers(4, 128, True), packed_integers(8, 128, False)]
)
def test_so_are_groups_of_which_the_last_is_smaller(tmp_path, store, less):
    parts, _ = store(torch.randn(24, 1056 - less))
    parts.pop("g_idx", None)
    check(opened(tmp_path, {LAYER: parts}), f"{LAYER}.weight", 0)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale_weight"])
def test_so_are_blocks_by_each_of_the_names_of_their_scales(tmp_path, name):
    """DeepSeek's, compressed-tensors' and sgl's."""
    parts, _ = SCHEMES["fp8 blocks"].store(torch.randn(300, 133))
    parts[name] = parts.pop("weight_scale_inv").bfloat16()
    check(opened(tmp_path, {LAYER: parts}), f"{LAYER}.weight", 0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_so_is_a_weight_of_four_dimensions(tmp_path, kind):
    parts, _ = four_bit(kind)(torch.randn(5, 3, 7, 3))
    check(opened(tmp_path, {LAYER: parts}), f"{LAYER}.weight", 0)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
def test_svdquants_low_rank_and_bias_are_the_cpus_but_for_the_order_of_sums(tmp_path, fp4, shifted):
    layer = BEHIND_GELU if shifted else LAYER
    weight, bias = torch.randn(384, 256) / 16, torch.randn(384)
    parts, exact = nunchaku_files.svdquant(weight, bias, fp4=fp4, shifted=shifted, rank=48)
    modulation = nunchaku_files.modulation(torch.randn(384, 64) / 8, torch.randn(384), 6)
    checkpoint = opened(tmp_path, {layer: parts, MODULATION: modulation})
    found = check(checkpoint, f"{layer}.weight", SUMMED)
    assert (found.double() - exact).abs().max() <= SUMMED * exact.abs().max()
    check(checkpoint, f"{layer}.bias", SUMMED)
    check(checkpoint, f"{MODULATION}.weight", 0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_so_is_awq_in_rows_of_four_bit_for_bit(tmp_path, dtype):
    parts, _ = nunchaku_files.awq_four_rows(torch.randn(132, 192), 64, ("scales", "scaled_zeros"), dtype)
    check(opened(tmp_path, {LAYER: parts}), f"{LAYER}.weight", 0)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "llm.int8"])
def test_a_file_decoded_on_the_gpu_is_the_one_that_the_cpu_makes(tmp_path, scheme):
    tensors = {f"blocks.{block}.q.weight": torch.randn(128, 512) for block in range(2)} | {
        "norm.weight": torch.randn(3)
    }
    theirs, _ = stored_as(tensors, ["blocks.0.q", "blocks.1.q"], SCHEMES[scheme])
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "theirs.safetensors")
    checkpoint = open_checkpoint(tmp_path / "theirs.safetensors")
    plan, made = make_plan(checkpoint, None, None), tmp_path / "made.safetensors"
    quantize_checkpoint(checkpoint, plan, made)
    on_cpu = load_file(made)
    quantize_checkpoint(checkpoint, plan, made, device="cuda")
    on_gpu = load_file(made)
    assert on_cpu.keys() == on_gpu.keys() == tensors.keys()
    assert all(torch.equal(on_gpu[name], tensor) for name, tensor in on_cpu.items())
