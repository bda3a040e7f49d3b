"""Claims about the command line: what it writes, what it says, and how it fails."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.cli import main


@pytest.fixture
def model(tmp_path):
    tensors = {f"blocks.{block}.attn.weight": (torch.randn(64, 256) * 0.02).bfloat16() for block in range(2)}
    tensors["head.weight"] = torch.randn(64, 256).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_quantize_then_inspect_against_the_original(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8", "--keep", "head, blocks.0"]) == 0
    assert "Written and verified" in capsys.readouterr().out
    tensors = load_file(target)
    assert tensors["blocks.1.attn.weight"].dtype == torch.int8
    assert tensors["blocks.0.attn.weight"].dtype == torch.bfloat16
    assert main(["inspect", str(target), "--against", str(model)]) == 0
    out = capsys.readouterr().out
    assert "blocks.1.attn  64x256  as stored int8_tensorwise" in out
    assert "head: kept by the rule 'head'" in out
    errors = [line for line in out.splitlines() if line.endswith("blocks.1.attn") and "e-0" in line]
    assert len(errors) == 1
    assert 1e-3 < float(errors[0].split()[0]) < 1.3e-2


def test_a_dry_run_writes_nothing(model, tmp_path, capsys):
    assert main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--format", "fp4", "--dry-run"]) == 0
    assert "quantized nvfp4" in capsys.readouterr().out
    assert not (tmp_path / "out.safetensors").exists()


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


def test_inspecting_against_another_model_is_refused(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    main(["quantize", str(model), str(target), "--format", "int8"])
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert main(["inspect", str(target), "--against", str(tmp_path / "other.safetensors")]) == 2
    assert "is not the original" in capsys.readouterr().err
