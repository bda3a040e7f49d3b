"""Claims about the streaming quantizer: bounded memory, aligned files, nothing half-written, safe in parallel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, StorageError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.keep_rules import parse_rules
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import quantize_weight
from lowbit.ops.stream import METADATA_KEY, RECIPE_KEY, quantize_checkpoint, read_origin
from lowbit.ops.writer import TEMPORARY_SUFFIX, CheckpointWriter

INT8 = FORMATS["int8"]


def quantize(source: Path, target: Path, name: str = "int8", rules: str = "auto", **options) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(source)
    quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[name], parse_rules(rules)), target, **options)
    return load_file(target)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(f"*{TEMPORARY_SUFFIX}")]


@pytest.mark.parametrize("name", FORMATS)
def test_files_hold_what_the_quantizer_makes_and_keep_the_rest_bit_for_bit(name, save, wan_tensors, tmp_path):
    result = quantize(save(wan_tensors, metadata={"config": "{}"}), tmp_path / "out.safetensors", name)
    row = FORMATS[name]
    expected = quantize_weight(
        wan_tensors["blocks.1.ffn.0.weight"], row.storage, unit_scale=row.unit_scale, fast=row.fast
    )
    for suffix, part in expected.items():
        written = result.pop(f"blocks.1.ffn.0.{suffix}")
        assert torch.equal(written.reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8))
    for kept in (
        "patch_embedding.weight",
        "head.head.weight",
        "blocks.0.modulation",
        "blocks.0.self_attn.norm_q.weight",
    ):
        assert torch.equal(result[kept], wan_tensors[kept])
    checkpoint = open_checkpoint(tmp_path / "out.safetensors")
    assert checkpoint.metadata["config"] == "{}"
    assert read_origin(checkpoint.metadata)["format"] == name
    assert "head.head" in read_origin(checkpoint.metadata)["kept"]


def test_dtypes_are_those_that_comfyui_maps_from_disk(save, wan_tensors, tmp_path):
    """ComfyUI 0.33 reads F8_E8M0 only without dynamic VRAM: MXFP8's block scales are stored as bytes."""
    quantize(save(wan_tensors), tmp_path / "out.safetensors", "mxfp8")
    entries = open_checkpoint(tmp_path / "out.safetensors").entries
    assert entries["blocks.0.ffn.0.weight_scale"].dtype == torch.uint8
    assert torch.float8_e8m0fnu not in {entry.dtype for entry in entries.values()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_a_few_tensors_whatever_the_size_of_the_file(tmp_path):
    """576 MiB in 32 MiB tensors: the process may grow by 3 tensors and 256 MiB, as issue 2 bounds it."""
    tensor_bytes, count = 32 << 20, 18
    script = """
        import os, sys, torch
        from pathlib import Path
        from lowbit.ops.checkpoint import open_checkpoint
        from lowbit.ops.formats import FORMATS
        from lowbit.ops.plan import make_plan
        from lowbit.ops.quantize import quantize_to_tensor
        from lowbit.ops.stream import quantize_checkpoint
        quantize_to_tensor(torch.randn(256, 256), FORMATS[sys.argv[3]])
        def peak():
            # Not ru_maxrss, which starts at the parent's.
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        os.fsync = lambda file: None  # a slow disk is waited for in vain
        idle = peak()
        checkpoint = open_checkpoint(sys.argv[1])
        quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[sys.argv[3]], None), Path(sys.argv[2]))
        print(peak() - idle)
    """
    source = tmp_path / "big.safetensors"
    block = (torch.randn(4096, 4096) * 0.02).bfloat16()
    with CheckpointWriter(source, name_bytes=4096, name_count=count, metadata={}) as writer:
        for number in range(count):
            writer.add(f"blocks.{number}.mlp.weight", block)
    grown = {}
    for name in ("fp8_e4m3fn_scaled", "int8_convrot_fast"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(tmp_path / "out.safetensors"), name]
        grown[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        (tmp_path / "out.safetensors").unlink()
    print(grown)
    assert all(0 < growth <= 3 * tensor_bytes + (256 << 20) for growth in grown.values()), grown
    source.unlink()


@pytest.mark.parametrize("poison", ["blocks.0.ffn.0.weight", "blocks.1.self_attn.norm_q.weight", "head.head.weight"])
def test_a_broken_weight_is_named_and_nothing_is_left(overlaps, poison, save, wan_tensors, tmp_path):
    wan_tensors[poison].view(-1)[5] = float("nan")
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {poison} holds NaN or Inf"):
        quantize(save(wan_tensors), tmp_path / "made" / "out.safetensors")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_cancelled_run_leaves_nothing(overlaps, save, wan_tensors, tmp_path):
    class CancelledError(Exception):
        pass

    def cancel(done, total, name):
        if done > total // 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        quantize(save(wan_tensors), tmp_path / "made" / "out.safetensors", progress=cancel)
    assert list((tmp_path / "made").iterdir()) == []


def test_progress_reaches_the_end_with_the_last_tensor(save, wan_tensors, tmp_path):
    seen = []
    target = tmp_path / "out.safetensors"
    quantize(save(wan_tensors), target, progress=lambda *step: seen.append((*step, target.exists())))
    assert [done for done, _, _, _ in seen] == sorted(done for done, _, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert not any(exists for *_, exists in seen)
    assert len(seen) == len(wan_tensors)


@pytest.mark.parametrize("change", ["before", "meanwhile"])
def test_a_source_that_changes_is_noticed_and_nothing_is_left(save, wan_tensors, tmp_path, change):
    source = save(wan_tensors)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, INT8, None)

    def replace(*progress):
        save({name: tensor * 0 for name, tensor in wan_tensors.items()})
        os.utime(source, (1, 1))

    if change == "before":
        replace()
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        quantize_checkpoint(checkpoint, plan, tmp_path / "made" / "out.safetensors", progress=replace)
    assert not list(tmp_path.glob("made/*"))


def test_a_source_that_goes_away_is_said_by_name(save, wan_tensors, tmp_path):
    source = save(wan_tensors)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can no longer be read"):
        quantize(source, tmp_path / "made" / "out.safetensors", progress=lambda *step: source.unlink(missing_ok=True))
    assert not list(tmp_path.glob("made/*"))


def test_what_is_true_of_the_source_alone_is_not_carried_on(save, wan_tensors, tmp_path):
    metadata = {"config": "{}", RECIPE_KEY: "x", METADATA_KEY: "{}", "_quantization_metadata": '{"layers": {}}'}
    quantize(save(wan_tensors, metadata=metadata), tmp_path / "out.safetensors")
    written = open_checkpoint(tmp_path / "out.safetensors").metadata
    assert set(written) == {"config", METADATA_KEY}
    assert read_origin(written)["source"] == "model.safetensors"


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_source_whose_name_is_no_text_gives_a_file_that_safetensors_reads(save, wan_tensors, tmp_path):
    source = save(wan_tensors).rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    quantize(source, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert read_origin(file.metadata())["source"] == "caf?.safetensors"


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(save, wan_tensors, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("lowbit.ops.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs 0\.00 GiB in .*, which has 0\.00 GiB free"):
        quantize(save(wan_tensors), tmp_path / "made" / "out.safetensors")
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_said(save, wan_tensors, tmp_path, monkeypatch):

    def always_full(descriptor: int, *args, **kwargs):
        os.close(descriptor)
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("lowbit.ops.writer.os.fdopen", always_full)
    with pytest.raises(StorageError, match="No space left on device"):
        quantize(save(wan_tensors), tmp_path / "made" / "out.safetensors")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "made" / "out.safetensors").exists()


def test_an_unwritable_folder_is_said(save, wan_tensors, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        quantize(save(wan_tensors), tmp_path / "file" / "out.safetensors")


def test_a_sharded_set_becomes_one_file(tmp_path, wan_tensors):
    names = sorted(wan_tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: wan_tensors[name] for name in part}, tmp_path / f"wan-{number:05}-of-00002.safetensors")
    weight_map = {name: f"wan-{1 + names.index(name) % 2:05}-of-00002.safetensors" for name in names}
    (tmp_path / "wan.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    result = quantize(tmp_path / "wan.safetensors.index.json", tmp_path / "out.safetensors")
    plan = make_plan(open_checkpoint(tmp_path / "wan.safetensors.index.json"), INT8, None)
    assert sum(layer.action == "quantize" for layer in plan.layers.values()) == 12
    for name in names:
        layer = plan.layers.get(name.removesuffix(".weight"))
        if layer is None or layer.action == "keep":
            assert torch.equal(result.pop(name), wan_tensors[name])
            continue
        for suffix, part in quantize_weight(wan_tensors[name], "int8").items():
            assert torch.equal(result.pop(f"{layer.name}.{suffix}"), part), name
    assert result == {}
