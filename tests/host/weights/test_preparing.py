"""From a file and a node's choices to the file to load: parts of checkpoints, patches, what ComfyUI lacks, what is saved."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CapabilityError, CheckpointError, StorageError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import core_config_tensor, quantize_weight
from lowbit.ops.stream import METADATA_KEY, RECIPE_KEY, quantize_checkpoint, read_origin
from testing import tiny

PREFIX = "model.diffusion_model."


def matrix() -> torch.Tensor:
    return torch.randn(64, 256).bfloat16()


@pytest.mark.parametrize("format_name", ["int8", "none"])
def test_the_diffusion_part_of_a_checkpoint_keeps_its_description_in_the_header(host, tmp_path, format_name):
    parts = quantize_weight(matrix(), "nvfp4")
    del parts["comfy_quant"]
    tensors = {f"{PREFIX}blocks.0.q.{suffix}": part for suffix, part in parts.items()}
    tensors |= {f"{PREFIX}blocks.{number}.q.weight": matrix() for number in range(1, 7)}
    tensors["first_stage_model.x.weight"] = matrix()
    layers = {f"{PREFIX}blocks.0.q": {"format": "nvfp4"}, "text_encoder.y": {"format": "nvfp4"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(tensors, tmp_path / "all_in_one.safetensors", metadata=metadata)
    planned = host.preparing.plan_diffusion_model(
        tmp_path / "all_in_one.safetensors", host.preparing.Request(format_name)
    )
    assert planned.plan.layers["blocks.0.q"].action == "stored"
    assert planned.plan.layers["blocks.1.q"].action == ("quantize" if format_name == "int8" else "keep")
    if planned.plan.changes_weights:
        written = load_file(host.preparing.prepared_file(planned))
        assert "blocks.0.q.comfy_quant" in written
        assert torch.equal(written["blocks.0.q.weight"], parts["weight"])


@pytest.mark.parametrize("format_name", ["int8", "none"])
def test_what_another_part_holds_decides_nothing(host, tmp_path, format_name):
    """Neither its damage nor its marker, which says that products stay in 16 bits."""
    source = load_file(host.folder / "wan_t2v.safetensors")
    metadata = dict(open_checkpoint(host.folder / "wan_t2v.safetensors").metadata)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in source.items()}
    weight = tensors[f"{PREFIX}blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    tensors[f"{PREFIX}blocks.0.ffn.0.weight"] = weight
    tensors["text_encoders.t5.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    tensors["text_encoders.t5.q.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    save_file(tensors, tmp_path / "all.safetensors", metadata=metadata)
    planned = host.preparing.plan_diffusion_model(tmp_path / "all.safetensors", host.preparing.Request(format_name))
    assert "full_precision_matrix_mult" not in planned.plan.stored.layers["blocks.0.ffn.0"].config
    loaded = host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))
    assert torch.equal(
        loaded.model.diffusion_model.blocks[0].ffn[0].weight._qdata.view(torch.uint8), weight.view(torch.uint8)
    )


@pytest.fixture
def controlnet(tmp_path):
    """A model patch that is neither InfiniteTalk's nor MultiTalk's."""
    tensors = {"controlnet_blocks.0.y_rms.weight": torch.ones(64), "controlnet_blocks.0.input_proj.weight": matrix()}
    save_file(tensors, tmp_path / "controlnet.safetensors")
    return tmp_path / "controlnet.safetensors"


def test_auto_leaves_another_patch_to_core_and_a_named_format_is_refused(host, controlnet):
    planned = host.preparing.plan_model_patch(controlnet, host.preparing.Request())
    assert planned.choice.startswith("none: only InfiniteTalk")
    assert host.preparing.prepared_file(planned) == controlnet
    with pytest.raises(CheckpointError, match="choose the format 'none'"):
        host.preparing.plan_model_patch(controlnet, host.preparing.Request("int8"))


@pytest.mark.parametrize("asked", ["auto", "none", "int8"])
@pytest.mark.parametrize("stored", ["int8", "fp8_e4m3fn_scaled", "fp4_scaled"])
def test_another_patch_that_is_quantized_is_refused_by_name(host, controlnet, tmp_path, stored, asked):
    checkpoint, target = open_checkpoint(controlnet), tmp_path / "quantized.safetensors"
    quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[stored], None), target)
    with pytest.raises(CheckpointError, match=r"^quantized\.safetensors is quantized, as only InfiniteTalk"):
        host.preparing.plan_model_patch(target, host.preparing.Request(asked))


def test_another_patch_that_is_a_plain_cast_goes_to_core(host, controlnet, tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(controlnet).items()}
    save_file(tensors, tmp_path / "cast.safetensors")
    planned = host.preparing.plan_model_patch(tmp_path / "cast.safetensors", host.preparing.Request())
    assert host.preparing.prepared_file(planned) == tmp_path / "cast.safetensors"


def test_auto_still_quantizes_an_infinitetalk_patch(host, tmp_path):
    patch = tiny.write("model_patches/infinitetalk.safetensors", tmp_path)
    assert host.preparing.plan_model_patch(patch, host.preparing.Request()).plan.changes_weights


def test_half_a_patch_is_said_by_name(host, tmp_path):
    save_file({"audio_proj.proj1.weight": matrix()}, tmp_path / "half.safetensors")
    with pytest.raises(
        CheckpointError, match=r"half\.safetensors is only part of an InfiniteTalk patch, without 'blocks"
    ):
        host.loading.load_model_patch(str(tmp_path / "half.safetensors"))


def test_a_patch_with_a_missing_tensor_is_said_in_one_line(host, tmp_path):
    tensors = dict(tiny.infinitetalk_tensors())
    tensors.pop("blocks.3.audio_cross_attn.proj.bias")
    save_file(tensors, tmp_path / "holey.safetensors")
    with pytest.raises(CheckpointError, match=r"holey\.safetensors does not hold") as raised:
        host.loading.load_model_patch(str(tmp_path / "holey.safetensors"))
    assert "\n" not in str(raised.value)


def test_a_format_that_this_comfyui_does_not_load_is_refused_before_anything_is_written(host, monkeypatch):
    import comfy.quant_ops

    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "asym_w4a8_int8")
    with pytest.raises(CapabilityError, match="'asym_w4a8_int8', a format that this ComfyUI"):
        host.preparing.plan_diffusion_model(
            host.folder / "wan_t2v.safetensors", host.preparing.Request("int4_asym_fast")
        )


def test_a_stored_format_that_nobody_knows_is_refused_with_the_layers_name(host, tmp_path):
    tensors = {
        "a.weight": torch.zeros(64, 64, dtype=torch.uint8),
        "a.comfy_quant": core_config_tensor({"format": "int3"}),
    }
    save_file(tensors, tmp_path / "new.safetensors")
    with pytest.raises(CapabilityError, match=r"new\.safetensors: the layer 'a' would be loaded as 'int3'"):
        host.preparing.plan_diffusion_model(tmp_path / "new.safetensors", host.preparing.Request("none"))


def test_a_description_that_cannot_be_believed_names_the_file_too(host, tmp_path):
    tensors = {"a.weight": matrix().to(torch.float8_e4m3fn), "a.smooth_scale": torch.ones(1, 2)}
    save_file(tensors, tmp_path / "smoothed.safetensors")
    with pytest.raises(CheckpointError, match=r"^smoothed\.safetensors: the quantized layer 'a' is scaled by"):
        host.preparing.plan_diffusion_model(tmp_path / "smoothed.safetensors", host.preparing.Request("none"))


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(host, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "cache"))
    for keep in (True, False):
        planned = host.preparing.plan_diffusion_model(
            host.folder / "wan_t2v.safetensors", host.preparing.Request("mxfp8", keep_quantized_file=keep)
        )
        with pytest.raises(StorageError, match="LOWBIT_CACHE_DIR") as raised:
            host.preparing.prepared_file(planned)
        assert str(raised.value).count(". ") == 0


def test_the_room_on_the_disk_is_asked_for_before_the_work_unless_the_file_is_there(host, monkeypatch):
    request = host.preparing.Request("fp8_e5m2")
    planned = host.preparing.plan_diffusion_model(host.folder / "wan_t2v.safetensors", request)
    monkeypatch.setattr("lowbit.ops.writer.shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="GiB free.*LOWBIT_CACHE_DIR"):
        host.preparing.check_disk(planned)
    monkeypatch.undo()
    host.preparing.prepared_file(planned)
    monkeypatch.setattr("lowbit.ops.writer.shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    host.preparing.check_disk(planned)
    host.preparing.check_disk(
        host.preparing.plan_diffusion_model(host.folder / "wan_t2v.safetensors", host.preparing.Request("none"))
    )


def test_auto_does_not_change_the_product_of_what_a_file_holds_quantized(host, tmp_path):
    tensors = {f"{name}.weight": matrix() for name in ("blocks.1.q", "blocks.2.q")}
    tensors |= {f"blocks.0.q.{suffix}": part for suffix, part in quantize_weight(matrix(), "float8_e4m3fn").items()}
    save_file(tensors, tmp_path / "mixed.safetensors")
    for name, kept in (("auto", True), ("int8_fast", False)):
        planned = host.preparing.plan_diffusion_model(tmp_path / "mixed.safetensors", host.preparing.Request(name))
        written = load_file(host.preparing.prepared_file(planned))
        config = json.loads(written["blocks.0.q.comfy_quant"].numpy().tobytes())
        assert config.get("full_precision_matrix_mult", False) is kept


def test_a_saved_model_says_what_was_kept_but_not_whose_cached_file_it_was(host, tmp_path, monkeypatch):
    """With the cache's own header the next quantization would take it for one of its outdated files."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    source = host.preparing.prepared_file(
        host.preparing.plan_diffusion_model(host.folder / "wan_t2v.safetensors", host.preparing.Request("int8"))
    )
    assert RECIPE_KEY in open_checkpoint(source).metadata
    saved = host.saving.save_diffusion_model(host.loading.load_diffusion_model(str(source)), "saved/wan")
    metadata = open_checkpoint(saved).metadata
    assert RECIPE_KEY not in metadata
    assert "config" in metadata
    assert METADATA_KEY in metadata
    assert "source" not in read_origin(metadata)
    assert "head.head" in read_origin(metadata)["kept"]


@pytest.mark.parametrize("prefix", ["", " ", ".", "..", "a_file/.."])
def test_a_prefix_that_names_no_file_is_refused(host, tmp_path, monkeypatch, prefix):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(StorageError, match=rf"'{re.escape(prefix)}' names no file: write a name"):
        host.saving.save_diffusion_model(None, prefix)
    assert not list(tmp_path.iterdir())


def test_saving_can_be_interrupted_while_the_file_is_written(host, tmp_path, monkeypatch):
    import comfy.model_management
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    patcher = host.loading.load_diffusion_model(str(host.folder / "wan_t2v.safetensors"))
    written = []

    def interrupted():
        (partial,) = tmp_path.rglob("*.partial")
        if partial.stat().st_size:
            written.append(partial)
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.saving.save_diffusion_model(patcher, "saved/wan")
    assert written
    assert not list(tmp_path.rglob("*wan*"))


def test_a_rule_that_decides_nothing_is_named_though_nobody_asks_for_a_report(host, caplog):
    source = host.folder / "wan_t2v.safetensors"
    host.preparing.plan_diffusion_model(source, host.preparing.Request("int8", "auto"))
    assert "matches no layer" not in caplog.text
    host.preparing.plan_diffusion_model(source, host.preparing.Request("int8", "auto, blokcs.0.*"))
    assert "wan_t2v.safetensors: The rule 'blokcs.0.*' matches no layer of this file." in caplog.text
