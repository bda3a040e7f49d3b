"""Claims about the command line: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import cli
from lowbit.cli import main
from lowbit.ops.device_info import DeviceInfo


@pytest.fixture
def model(tmp_path):
    tensors = {f"blocks.{block}.attn.weight": (torch.randn(64, 256) * 0.02).bfloat16() for block in range(2)}
    tensors["head.weight"] = torch.randn(64, 256).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_quantize_then_inspect_against_the_original(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8", "--keep", "head, blocks.0"]) == 0
    assert "\nFormat int8: asked for\nWritten and verified: " in capsys.readouterr().out
    tensors = load_file(target)
    assert tensors["blocks.1.attn.weight"].dtype == torch.int8
    assert tensors["blocks.0.attn.weight"].dtype == torch.bfloat16
    assert main(["inspect", str(target), "--against", str(model)]) == 0
    out = capsys.readouterr().out
    assert "blocks.1.attn  64x256  as stored int8" in out
    assert "head: kept by the rule 'head'" in out
    errors = [line for line in out.splitlines() if line.endswith("blocks.1.attn") and "e-0" in line]
    assert len(errors) == 1
    assert 1e-3 < float(errors[0].split()[0]) < 1.3e-2


def test_a_rule_that_decides_nothing_is_named(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8", "--keep", "haed, blocks.0"]) == 0
    out = capsys.readouterr().out
    assert "The rule 'haed' matches no layer" in out
    assert "'blocks.0' matches" not in out


def test_a_dry_run_writes_nothing(model, tmp_path, capsys):
    assert main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--format", "fp4", "--dry-run"]) == 0
    assert "quantized nvfp4" in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


def test_names_that_comfyui_changes_after_loading_are_refused_before_a_byte_is_written(tmp_path, capsys):
    names = ("x_embedder", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")
    save_file({f"{name}.weight": torch.randn(64, 256).bfloat16() for name in names}, tmp_path / "flux.safetensors")
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(tmp_path / "flux.safetensors"), str(target), "--format", "int8"]) == 2
    assert "flux.safetensors has diffusers' names of Flux" in capsys.readouterr().err
    assert not target.exists()
    assert main(["quantize", str(tmp_path / "flux.safetensors"), str(target), "--format", "none"]) == 0


def test_tables_stay_whatever_the_rules_say(tmp_path):
    names = ("vision_model.embeddings.position_embedding", "model.layers.0.q")
    save_file({f"{name}.weight": torch.randn(64, 256).bfloat16() for name in names}, tmp_path / "model.safetensors")
    target = tmp_path / "out.safetensors"
    keep = "!position_embedding, !q"
    assert main(["quantize", str(tmp_path / "model.safetensors"), str(target), "--format", "fp4", "--keep", keep]) == 0
    tensors = load_file(target)
    assert tensors["vision_model.embeddings.position_embedding.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.q.weight"].dtype == torch.uint8


@pytest.mark.parametrize("content", [b"", b"garbage" * 10, b"\x80\x04pickle", b"PK\x03\x04zip"])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, content, capsys):
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert main(["quantize", str(tmp_path / "bad.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("lowbit: bad.safetensors")
    assert "\n" not in message
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_overwritten_unasked(model, tmp_path, capsys):
    assert main(["quantize", str(model), str(model), "--overwrite"]) == 2
    assert "is the source itself" in capsys.readouterr().err
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    assert main(["quantize", str(model), str(target)]) == 2
    assert target.read_text() == "precious"


def test_a_folder_that_does_not_exist_is_not_made(model, tmp_path, capsys):
    target = tmp_path / "modles" / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8"]) == 2
    message = capsys.readouterr().err.strip()
    assert message == f"lowbit: The folder {target.parent} does not exist: make it, or name a file in another one."
    assert not target.parent.exists()


def test_inspecting_against_another_model_is_refused(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    main(["quantize", str(model), str(target), "--format", "int8"])
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert main(["inspect", str(target), "--against", str(tmp_path / "other.safetensors")]) == 2
    assert "is not the original" in capsys.readouterr().err


def test_a_file_that_is_not_quantized_cannot_be_compared(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    main(["quantize", str(model), str(target), "--format", "int8"])
    capsys.readouterr()
    assert main(["inspect", str(model), "--against", str(target)]) == 2
    said = capsys.readouterr()
    assert f"{model.name} is not quantized: name the file that was made from {target.name}." in said.err
    assert "relative error" not in said.out


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_one_sentence_and_exit_code_2(model, tmp_path, name, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8", "--device", name]) == 2
    message = capsys.readouterr().err.strip()
    assert f"device '{name}'" in message
    assert "\n" not in message
    assert not target.exists()


def test_cuda_without_a_driver_is_one_sentence(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["quantize", str(model), str(tmp_path / "o.safetensors"), "--format", "int8", "--device", "cuda"]) == 2
    assert "torch finds 0 NVIDIA GPUs" in capsys.readouterr().err


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs; returns the devices that were asked to quantize."""
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "device_info", lambda device: DeviceInfo(str(device), (9, 0), 1 << 40))
    real = cli.quantize_checkpoint

    def quantize(*arguments, device, **options):
        used.append(str(device))
        if str(device) != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(*arguments, device=device, **options)

    monkeypatch.setattr(cli, "quantize_checkpoint", quantize)
    return used


@pytest.mark.parametrize(("options", "device"), [([], "cuda:0"), (["--device", "cuda:1"], "cuda:1")])
def test_the_gpu_that_was_named_quantizes_and_the_cpu_when_it_has_no_room(
    two_gpus, model, tmp_path, options, device, caplog
):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8", *options]) == 0
    assert two_gpus == [device, "cpu"]
    assert load_file(target)["blocks.0.attn.weight"].dtype == torch.int8
    assert f"Too little free memory on {device}" in caplog.text


def test_a_reader_that_has_seen_enough_is_no_error(model):
    command = [sys.executable, "-m", "lowbit", "inspect", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Error" not in process.stderr.read()
    assert process.wait() == 141


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_no_text_is_shown_and_quantized(model, tmp_path):
    source = model.rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    environment = os.environ | {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (["inspect", source], ["quantize", source, tmp_path / "out.safetensors", "--format", "int8"]):
        done = subprocess.run(
            [sys.executable, "-m", "lowbit", *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out.safetensors")["blocks.0.attn.weight"].dtype == torch.int8


@pytest.mark.parametrize("target", ["x" * 300 + ".safetensors", "file/out.safetensors", "folder"])
def test_a_target_that_cannot_be_is_one_sentence_and_exit_code_2(model, tmp_path, target, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert main(["quantize", str(model), str(tmp_path / target), "--format", "int8", "--overwrite"]) == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["out", "out.gguf", "out.ckpt", "out.safetensors.bak", ".safetensors"])
def test_a_name_that_comfyui_would_not_open_is_refused(model, tmp_path, name, capsys):
    assert main(["quantize", str(model), str(tmp_path / name), "--format", "int8"]) == 2
    assert "is no name that ends in .safetensors" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes in folders")
def test_what_is_no_file_is_not_written_over(model, tmp_path, capsys):
    """A device is the worst: root may replace it."""
    target = tmp_path / "pipe.safetensors"
    os.mkfifo(target)
    assert main(["quantize", str(model), str(target), "--format", "int8", "--overwrite"]) == 2
    assert "is no file and cannot be written over" in capsys.readouterr().err
    assert target.is_fifo()


LORA = "diffusion_model.blocks.0.q"


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *(("a LoRA", f"{LORA}.{end}.weight") for end in ("lora_down", "lora_A", "lora_A.default", "lora.down", "a1")),
        ("a LoRA", f"{LORA}_lora.down.weight"),
        ("a LoRA", f"{LORA}.lora_linear_layer.down.weight"),
        ("a LoRA", f"{LORA}.oft_blocks"),
        ("a LoRA", f"{LORA}.lokr_w2_b"),
        ("a ControlNet or a model patch", "controlnet_x_embedder.weight"),
        ("a ControlNet or a model patch", "control_img_in.weight"),
        ("a ControlNet or a model patch", "control_all_x_embedder.2-1.weight"),
        ("a ControlNet or a model patch", "controlnet_blocks.0.input_proj.weight"),
        ("a CLIP vision model", "visual_projection.weight"),
        ("a style model", "redux_up.weight"),
        ("a VAE", "decoder.mid_block.attentions.0.to_q.weight"),
        ("a VAE", "decoder.middle.0.residual.2.weight"),
    ],
)
def test_what_comfyui_does_not_read_quantized_is_refused_before_a_byte_is_written(tmp_path, what, name, capsys):
    source, target = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    save_file({key: torch.randn(64, 256).bfloat16() for key in (name, "transformer_blocks.0.attn.to_q.weight")}, source)
    assert main(["quantize", str(source), str(target), "--format", "int8"]) == 2
    assert f"other.safetensors is {what}, which ComfyUI does not read quantized" in capsys.readouterr().err
    assert not target.exists()


def test_a_lora_too_small_to_quantize_is_refused_all_the_same(tmp_path, capsys):
    source, target = tmp_path / "small.safetensors", tmp_path / "out.safetensors"
    save_file({f"{LORA}.lora_A.weight": torch.randn(8, 256), f"{LORA}.lora_B.weight": torch.randn(256, 8)}, source)
    for format_name in ("auto", "int8"):
        assert main(["quantize", str(source), str(target), "--format", format_name]) == 2
        assert "small.safetensors is a LoRA, which ComfyUI does not read quantized" in capsys.readouterr().err
    assert not target.exists()


def test_layers_that_the_original_has_quantized_are_not_compared_with_their_codes(model, tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    main(["quantize", str(model), str(first), "--format", "int8", "--keep", "!blocks.0, *"])
    main(["quantize", str(first), str(second), "--format", "int8"])
    capsys.readouterr()
    assert main(["inspect", str(second), "--against", str(first)]) == 0
    out = capsys.readouterr().out.partition("relative error")[2]
    assert "blocks.1.attn" in out
    assert "blocks.0.attn" not in out
    assert main(["inspect", str(second), "--against", str(second)]) == 2
    assert "second.safetensors is quantized itself: name the file" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")
def test_a_link_that_leads_in_a_circle_is_one_sentence(model, tmp_path, capsys):
    link, other = tmp_path / "link.safetensors", tmp_path / "other.safetensors"
    link.symlink_to(other)
    other.symlink_to(link)
    assert main(["quantize", str(model), str(link), "--format", "int8", "--overwrite"]) == 2
    assert "cannot be written (Too many levels of symbolic links)" in capsys.readouterr().err


def test_what_a_rule_keeps_is_not_said_to_be_quantized_or_small(model, tmp_path, capsys):
    assert main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--keep", "*"]) == 0
    out = capsys.readouterr().out
    assert "or kept by a rule" in out
    assert "\nNothing was quantized.\nWritten and verified: " in out


def test_auto_leaves_the_product_of_stored_layers_to_the_file(model, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    main(["quantize", str(model), str(first), "--format", "int8", "--keep", "!blocks.0, *"])
    for name, kept in (("auto", True), ("int8_fast", False)):
        assert main(["quantize", str(first), str(second), "--format", name, "--overwrite"]) == 0
        config = json.loads(load_file(second)["blocks.0.attn.comfy_quant"].numpy().tobytes())
        assert config.get("full_precision_matrix_mult", False) is kept
