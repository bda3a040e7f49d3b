"""Files of nunchaku's open in ComfyUI's names, with the numbers that its kernels multiply with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.cli import main
from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import decoded, open_checkpoint
from testing import tiny
from testing.measure import relative_error
from testing.tiny import nunchaku_files
from testing.tiny.qwen_image import QwenImageConfig
from testing.tiny.tensors import draw, linear, norm

QWEN = "transformer_blocks.0"


def flux_tensors(width: int = 128) -> dict[str, torch.Tensor]:
    """A tiny Flux in the names of its first file."""
    shapes = {**linear("img_in", width, 64), **linear("txt_in", width, 64), **linear("final_layer.linear", 64, width)}
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for part, columns in (("time", 256), ("vector", 32), ("guidance", 256)):
        shapes |= {**linear(f"{part}_in.in_layer", width, columns), **linear(f"{part}_in.out_layer", width, width)}
    for block in range(2):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            shapes |= {
                **linear(f"{name}_attn.qkv", 3 * width, width),
                **linear(f"{name}_attn.proj", width, width),
                **linear(f"{name}_mlp.0", 4 * width, width),
                **linear(f"{name}_mlp.2", width, 4 * width),
                **linear(f"{name}_mod.lin", 6 * width, width),
                f"{name}_attn.norm.query_norm.scale": (128,),
                f"{name}_attn.norm.key_norm.scale": (128,),
            }
    shapes |= {
        **linear("single_blocks.0.linear1", 7 * width, width),
        **linear("single_blocks.0.linear2", width, 5 * width),
        **linear("single_blocks.0.modulation.lin", 3 * width, width),
        "single_blocks.0.norm.query_norm.scale": (128,),
        "single_blocks.0.norm.key_norm.scale": (128,),
    }
    return draw(shapes)


def z_image_tensors(width: int = 128) -> dict[str, torch.Tensor]:
    """A tiny Z-Image in ComfyUI's names."""
    shapes = {**linear("x_embedder", width, 64), **linear("final_layer.linear", 64, width)}
    shapes |= {**linear("final_layer.adaLN_modulation.1", width, width), **linear("cap_embedder.1", width, 64)}
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"):
        shapes |= {
            **linear(f"{block}.attention.qkv", 3 * width, width, bias=False),
            **linear(f"{block}.attention.out", width, width, bias=False),
            **norm(f"{block}.attention.q_norm", 128),
            **norm(f"{block}.attention.k_norm", 128),
            **linear(f"{block}.feed_forward.w1", 2 * width, width, bias=False),
            **linear(f"{block}.feed_forward.w2", width, 2 * width, bias=False),
            **linear(f"{block}.feed_forward.w3", 2 * width, width, bias=False),
            **norm(f"{block}.attention_norm1", width),
            **linear(f"{block}.adaLN_modulation.0", 4 * width, width),
        }
    return draw(shapes)


MODELS = {
    "Qwen-Image": (lambda: tiny.qwen_image_tensors(QwenImageConfig(layers=1)), nunchaku_files.qwen_image),
    "Flux": (flux_tensors, nunchaku_files.flux),
    "Flux, newer names": (flux_tensors, lambda tensors, fp4: nunchaku_files.flux(tensors, fp4, older=False)),
    "Z-Image": (z_image_tensors, nunchaku_files.z_image),
}


def saved(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_comfyuis_names_and_its_weights(model, fp4, tmp_path):
    make, theirs = MODELS[model]
    ours = make()
    checkpoint = open_checkpoint(saved(theirs(ours, fp4), tmp_path / "nunchaku.safetensors"))
    assert set(checkpoint.entries) == set(ours)
    packed = 0
    for name, tensor in ours.items():
        entry = checkpoint.entries[name]
        assert entry.shape == tuple(tensor.shape), name
        read = checkpoint.read(name)
        if entry.decoded_from and name.endswith("weight"):
            packed += 1
            # What 4 bits cost; any row or column in another place costs its whole size.
            assert relative_error(read, tensor) < 0.2, name
        elif name.endswith("bias"):
            assert (read.float() - tensor.float()).abs().max() < 0.02, name
        else:
            assert torch.equal(read, tensor), name
    assert packed >= 8


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("fp4", [False, True], ids=["int4", "nvfp4"])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), rank=st.integers(1, 4))
def test_svdquant_is_exact(fp4, shifted, older, tmp_path, rows, columns, rank):
    torch.manual_seed(rows * 100 + columns * 10 + rank)
    weight, bias = torch.randn(rows * 128, columns * 128) / 16, torch.randn(rows * 128)
    parts, exact = nunchaku_files.svdquant(weight, bias, fp4=fp4, shifted=shifted, rank=rank * 16, older=older)
    layer = f"{QWEN}.img_mlp.net.2" if shifted else f"{QWEN}.attn.to_out.0"
    tensors = tiny.qwen_image_tensors()
    mod = nunchaku_files.modulation(tensors[f"{QWEN}.img_mod.1.weight"], tensors[f"{QWEN}.img_mod.1.bias"], 6)
    file = {f"{layer}.{suffix}": part for suffix, part in parts.items()}
    file |= {f"{QWEN}.img_mod.1.{suffix}": part for suffix, part in mod.items()}
    checkpoint = open_checkpoint(saved(file, tmp_path / "nunchaku.safetensors"))
    read = decoded(checkpoint.entries[f"{layer}.weight"], checkpoint.read_stored(f"{layer}.weight")).double()
    assert (read - exact).abs().max() <= 1e-5 * exact.abs().max()
    read_bias = decoded(checkpoint.entries[f"{layer}.bias"], checkpoint.read_stored(f"{layer}.bias"))
    assert (read_bias - bias).abs().max() < 0.02


def test_a_bias_behind_a_gelu_is_made_up_for_in_int4_alone(tmp_path):
    """What the kernel adds to a GELU's output is in the bias of the file, and no longer in ComfyUI's."""
    weight, bias = torch.randn(128, 256), torch.zeros(128)
    for fp4 in (False, True):
        parts, _ = nunchaku_files.svdquant(weight, bias, fp4=fp4, shifted=True)
        assert (parts["bias"].abs().max() > 0.1) is not fp4


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(8, 64), (36, 192), (128, 256)])
def test_a_text_encoders_w4a16_is_exact(dtype, shape, tmp_path):
    parts, exact = nunchaku_files.awq_four_rows(torch.randn(shape), 64, ("scales", "scaled_zeros"), dtype)
    name = "encoder.block.0.layer.0.SelfAttention.q"
    path = saved({f"{name}.{suffix}": part for suffix, part in parts.items()}, tmp_path / "t5.safetensors")
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.entries) == {f"{name}.weight"}
    read = decoded(checkpoint.entries[f"{name}.weight"], checkpoint.read_stored(f"{name}.weight")).double()
    assert (read - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_another_models_layers_are_refused_by_name(tmp_path):
    parts, _ = nunchaku_files.svdquant(torch.randn(128, 128), None, fp4=False)
    file = {f"transformer_blocks.0.attn1.to_q.{suffix}": part for suffix, part in parts.items()}
    with pytest.raises(
        CheckpointError, match=r"'transformer_blocks.0.attn1.to_q' as nunchaku packs it.*Flux, Qwen-Image"
    ):
        open_checkpoint(saved(file, tmp_path / "sana.safetensors"))


def test_a_layer_of_which_a_part_is_missing_is_said(tmp_path):
    file = nunchaku_files.flux(flux_tensors())
    for cut, reason in (("mlp_fc1", "mlp_fc1.weight' is missing"), ("mlp_fc1.lora_up", "'lora_up' is missing")):
        left = {name: tensor for name, tensor in file.items() if f"single_transformer_blocks.0.{cut}" not in name}
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(saved(left, tmp_path / "flux.safetensors"))


def test_the_command_line_makes_a_file_in_comfyuis_names(tmp_path, capsys):
    ours = flux_tensors()
    source = saved(nunchaku_files.flux(ours), tmp_path / "nunchaku.safetensors")
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(source), str(target), "--format", "int8"]) == 0
    assert "layers are svdquant of nunchaku in INT4, which ComfyUI cannot multiply with" in capsys.readouterr().out
    made = load_file(target)
    assert made["double_blocks.0.img_attn.qkv.weight"].dtype == torch.int8
    assert {name for name in made if "_scale" not in name and not name.endswith("comfy_quant")} == set(ours)
    assert main(["inspect", str(source)]) == 0
    assert "layers are AWQ of nunchaku" in capsys.readouterr().out
