"""GGUF files open as checkpoints: names, shapes and numbers are what ComfyUI would have had from safetensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CapabilityError, CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS
from lowbit.ops.gguf_names import TEXT_ARCHITECTURES, halves_from_pairs
from lowbit.ops.plan import make_plan
from lowbit.ops.plan_report import plan_report
from lowbit.ops.stream import quantize_checkpoint

gguf = pytest.importorskip("gguf")
Q8 = gguf.GGMLQuantizationType.Q8_0


def write(path, arch, tensors, fields=None):
    """A GGUF file; a tensor is float32 numbers, or (numbers, block format)."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (fields or {}).items():
        getattr(writer, f"add_{'array' if isinstance(value, list) else type(value).__name__.replace('int', 'uint32')}")(
            name, value
        )
    for name, value in tensors.items():
        if isinstance(value, tuple):
            numbers, kind = value
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_diffusion_models_tensors_have_their_names_shapes_and_numbers(tmp_path):
    weight, patch = numbers(64, 96), numbers(64, 2, 1, 2, 2)
    path = write(
        tmp_path / "wan.gguf",
        "wan",
        {
            "blocks.0.ffn.0.weight": (weight, Q8),
            "patch_embedding.weight": patch.reshape(64, 8),
            "blocks.0.norm.bias": numbers(64),
        },
        {"comfy.gguf.orig_shape.patch_embedding.weight": [64, 2, 1, 2, 2]},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.entries["patch_embedding.weight"].shape == (64, 2, 1, 2, 2)
    assert torch.equal(checkpoint.read("patch_embedding.weight"), torch.from_numpy(patch))
    entry = checkpoint.entries["blocks.0.ffn.0.weight"]
    assert (entry.shape, entry.dtype, entry.encoding) == ((64, 96), torch.bfloat16, "Q8_0")
    want = torch.from_numpy(gguf.dequantize(gguf.quants.quantize(weight, Q8), Q8))
    assert torch.equal(checkpoint.read("blocks.0.ffn.0.weight"), want.to(torch.bfloat16))


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3fn_scaled", "fp4_scaled"])
def test_quantizing_starts_from_the_decoded_numbers_not_from_rounded_ones(tmp_path, format):
    weight = numbers(64, 256)
    coded = gguf.dequantize(gguf.quants.quantize(weight, Q8), Q8)
    plain = write(tmp_path / "plain.gguf", "wan", {"blocks.0.ffn.0.weight": coded})
    blocks = write(tmp_path / "blocks.gguf", "wan", {"blocks.0.ffn.0.weight": (weight, Q8)})
    made = []
    for source in (plain, blocks):
        checkpoint = open_checkpoint(source)
        plan = make_plan(checkpoint, FORMATS[format], None)
        quantize_checkpoint(checkpoint, plan, tmp_path / f"{source.stem}.safetensors")
        made.append(load_file(tmp_path / f"{source.stem}.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(
        torch.equal(made[0][name].reshape(-1).view(torch.uint8), made[1][name].reshape(-1).view(torch.uint8))
        for name in made[0]
    )


def test_what_is_kept_is_counted_and_written_in_16_bits(tmp_path):
    path = write(tmp_path / "wan.gguf", "wan", {"blocks.0.ffn.0.weight": (numbers(64, 256), Q8)})
    checkpoint = open_checkpoint(path)
    plan = make_plan(checkpoint, None, None)
    assert (plan.nbytes_before, plan.nbytes_after) == (64 * 256 // 32 * 34, 64 * 256 * 2)
    quantize_checkpoint(checkpoint, plan, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["blocks.0.ffn.0.weight"].dtype == torch.bfloat16


def test_halves_are_what_the_pairs_of_llama_cpp_were():
    heads, head_dim = 2, 8
    rows = torch.arange(heads * head_dim).view(-1, 1)
    # What llama.cpp's converter does to Hugging Face's rows.
    pairs = rows.reshape(heads, 2, head_dim // 2, 1).swapaxes(1, 2).reshape(rows.shape)
    assert torch.equal(halves_from_pairs(pairs, heads), rows)


def test_text_encoders_get_comfyuis_names(tmp_path):
    q, norm = numbers(64, 64), np.ones(64, np.float32) * 1.5
    fields = {"gemma3.attention.head_count": 4, "gemma3.attention.head_count_kv": 2}
    path = write(
        tmp_path / "gemma.gguf",
        "gemma3",
        {
            "token_embd.weight": numbers(128, 64),
            "blk.3.attn_q.weight": q,
            "blk.3.ffn_norm.weight": norm,
            "blk.3.attn_q_norm.weight": norm,
            "rope_freqs.weight": norm,
        },
        fields,
    )
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.entries) == {
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.pre_feedforward_layernorm.weight",
        "model.layers.3.self_attn.q_norm.weight",
    }
    assert torch.equal(checkpoint.read("model.layers.3.self_attn.q_norm.weight"), torch.full((64,), 0.5))
    assert torch.equal(checkpoint.read("model.layers.3.self_attn.q_proj.weight"), torch.from_numpy(q))


def test_llamas_queries_and_keys_are_put_in_halves(tmp_path):
    q, k = numbers(64, 64), numbers(32, 64, seed=1)
    fields = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    path = write(tmp_path / "llama.gguf", "llama", {"blk.0.attn_q.weight": (q, Q8), "blk.0.attn_k.weight": k}, fields)
    checkpoint = open_checkpoint(path)
    want = halves_from_pairs(torch.from_numpy(k), 2)
    assert torch.equal(checkpoint.read("model.layers.0.self_attn.k_proj.weight"), want)
    decoded = torch.from_numpy(gguf.dequantize(gguf.quants.quantize(q, Q8), Q8))
    assert torch.equal(
        checkpoint.read("model.layers.0.self_attn.q_proj.weight"), halves_from_pairs(decoded, 4).to(torch.bfloat16)
    )


@pytest.mark.parametrize("suffix", ["scale", "weight.scale"])
@pytest.mark.parametrize(
    ("architecture", "layer", "ours"),
    [
        ("qwen3", "blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("llama", "blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("wan", "blocks.0.ffn.0", "blocks.0.ffn.0"),
    ],
)
def test_a_scale_of_the_whole_tensor_is_multiplied_in(tmp_path, architecture, layer, ours, suffix):
    """llama.cpp stores the second scale of NVFP4 beside the weight."""
    fields = {f"{architecture}.attention.head_count": 4}
    tensors = {f"{layer}.weight": (numbers(32, 64), Q8), "norm.scale": numbers(1)}
    plain = open_checkpoint(write(tmp_path / "plain.gguf", architecture, tensors, fields)).read(f"{ours}.weight")
    tensors |= {f"{layer}.{suffix}": np.array([0.03], np.float32), f"{layer}.input_scale": np.array([7], np.float32)}
    made = open_checkpoint(write(tmp_path / "scaled.gguf", architecture, tensors, fields))
    torch.testing.assert_close(made.read(f"{ours}.weight"), 0.03 * plain, rtol=1e-2, atol=0)
    assert f"{layer}.{suffix}" not in made.entries


def test_a_block_format_that_nothing_decodes_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    kind = gguf.GGMLQuantizationType.Q8_K
    writer.add_tensor("blocks.0.ffn.0.weight", np.zeros((4, 292), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CapabilityError, match="stored as GGUF's Q8_K, which the package 'gguf' does not decode"):
        open_checkpoint(tmp_path / "m.gguf").read("blocks.0.ffn.0.weight")


def test_a_vision_tower_comes_from_the_file_beside(tmp_path):
    write(tmp_path / "Qwen2.5-VL-7B-Q4_K_M.gguf", "qwen2vl", {"blk.0.attn_q.weight": numbers(32, 32)})
    q, k, v = (numbers(32, 32, seed=seed) for seed in range(3))
    frames = [numbers(32, 3, 2, 2, seed=seed) for seed in (4, 5)]
    tensors = {f"v.blk.0.attn_{name}.weight": value for name, value in zip("qkv", (q, k, v), strict=True)}
    tensors |= {
        "v.patch_embd.weight": frames[0],
        "v.patch_embd.weight.1": frames[1],
        "mm.0.weight": q,
        "v.blk.0.ln1.weight": q[0],
    }
    write(tmp_path / "Qwen2.5-VL-7B-mmproj-F16.gguf", "clip", tensors)
    checkpoint = open_checkpoint(tmp_path / "Qwen2.5-VL-7B-Q4_K_M.gguf")
    assert torch.equal(checkpoint.read("visual.blocks.0.attn.qkv.weight"), torch.from_numpy(np.concatenate([q, k, v])))
    patches = checkpoint.read("visual.patch_embed.proj.weight")
    assert torch.equal(patches, torch.from_numpy(np.stack(frames, 2)))
    assert {"visual.merger.mlp.0.weight", "visual.blocks.0.norm1.weight"} <= set(checkpoint.entries)
    assert len(checkpoint.stamps) == 2, "a change of either file is a change"


def test_a_vision_tower_of_another_width_is_another_models(tmp_path):
    for name, width in (("Qwen2.5-VL-7B-mmproj", 48), ("mmproj-F16", 64)):
        tower = {"v.blk.0.ln1.weight": numbers(1, 32)[0], "mm.2.weight": numbers(width, 32)}
        write(tmp_path / f"{name}.gguf", "clip", tower)
    path = write(tmp_path / "Qwen2.5-VL-7B.gguf", "qwen2vl", {"token_embd.weight": numbers(96, 64)})
    assert open_checkpoint(path).entries["visual.merger.mlp.2.weight"].path.name == "mmproj-F16.gguf"
    (tmp_path / "mmproj-F16.gguf").unlink()
    assert set(open_checkpoint(path).entries) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, damage):
    path = write(tmp_path / "model.gguf", "wan", {"a.weight": numbers(64, 64)})
    raw = path.read_bytes()
    if damage == "cut":
        path.write_bytes(raw[:-100])
    elif damage == "header":
        path.write_bytes(raw[:8] + b"\xff" * 16 + raw[24:])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        open_checkpoint(path)


def test_a_file_is_read_again_only_when_it_or_a_tower_beside_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "vl.gguf", "qwen2vl", {"token_embd.weight": numbers(96, 64)})
    read, real = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path.name) or real(path))
    for _ in range(3):
        assert set(open_checkpoint(path).entries) == {"model.embed_tokens.weight"}
    assert read == ["vl.gguf"]
    write(tmp_path / "vl-mmproj.gguf", "clip", {"mm.2.weight": numbers(64, 32)})
    assert "visual.merger.mlp.2.weight" in open_checkpoint(path).entries
    write(path, "qwen2vl", {"token_embd.weight": numbers(128, 64)})
    assert open_checkpoint(path).entries["model.embed_tokens.weight"].shape == (128, 64)


def test_a_part_of_a_split_file_is_refused(tmp_path):
    tensors = {"blk.0.attn_q.weight": numbers(32, 32)}
    path = write(tmp_path / "m-00001-of-00003.gguf", "qwen3", tensors, {"split.count": 3, "split.no": 0})
    with pytest.raises(CheckpointError, match=r"^m-00001-of-00003.gguf is one of 3 files of a model: join them"):
        open_checkpoint(path)
    path = write(tmp_path / "whole.gguf", "qwen3", tensors, {"split.count": 1})
    assert set(open_checkpoint(path).entries) == {"model.layers.0.self_attn.q_proj.weight"}


def test_every_architecture_names_what_comfyui_tells_it_by():
    assert (
        TEXT_ARCHITECTURES["t5"].name("enc.blk.23.ffn_up.weight")
        == "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    )
    assert TEXT_ARCHITECTURES["qwen3"].name("blk.0.attn_q_norm.weight") == "model.layers.0.self_attn.q_norm.weight"
    assert TEXT_ARCHITECTURES["qwen2vl"].name("blk.0.attn_k.bias") == "model.layers.0.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("architecture", "tensor", "sentence"),
    [
        (
            "deepseek2",
            "token_embd.weight",
            "is a language model of the architecture 'deepseek2', whose tensors are not",
        ),
        ("qwen3vl", "token_embd.weight", "is a language model of the architecture 'qwen3vl'"),
        (
            "qwen3",
            "model.layers.0.mlp.up_proj.weight",
            r"calls itself a text encoder \('qwen3'\), but has none of the names",
        ),
        ("clip", "v.blk.0.attn_q.weight", "is the vision tower of a text encoder, which is read along with it"),
    ],
)
def test_what_is_no_model_of_its_own_is_refused_by_what_it_is(tmp_path, architecture, tensor, sentence):
    path = write(tmp_path / "file.gguf", architecture, {tensor: numbers(64, 64)})
    with pytest.raises(CheckpointError, match=f"^file.gguf {sentence}"):
        open_checkpoint(path)


def test_the_report_says_what_is_decoded(tmp_path):
    q4 = gguf.GGMLQuantizationType.Q4_0
    tensors = {f"blocks.{block}.ffn.0.weight": (numbers(64, 256), Q8) for block in range(2)}
    tensors |= {"blocks.0.ffn.2.weight": (numbers(64, 256), q4), "head.head.weight": numbers(64, 256)}
    checkpoint = open_checkpoint(write(tmp_path / "wan.gguf", "wan", tensors))
    plan = make_plan(checkpoint, FORMATS["int8"], None)
    lines = plan_report(checkpoint, plan, DeviceInfo("NVIDIA H200", (9, 0), 140 << 30), "int8").splitlines()
    assert "2 layers are Q8_0 of GGUF, which ComfyUI cannot multiply with: they are decoded and stored anew." in lines
    assert "1 layer is Q4_0 of GGUF, which ComfyUI cannot multiply with: it is decoded and stored anew." in lines
    assert sum("of GGUF" in line for line in lines) == 2
