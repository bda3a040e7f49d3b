"""A file that holds NaN or Inf is named: at once, when its model is placed, or beside the steps that follow the first."""

from __future__ import annotations

import threading
import types
from concurrent import futures

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError
from lowbit.ops import finite
from lowbit.ops.checkpoint import open_checkpoint
from testing import tiny

from .files import built, quantized_file, save

KEPT = "blocks.0.norm3.weight"


def damaged(path, name, byte, count=1):
    """`path` with the last bytes of the tensor `name` overwritten, which is where whoever looks stops last."""
    entry = open_checkpoint(path).entries[name]
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - count)
        file.write(byte * count)
    return path


LAYER = "blocks.1.ffn.0"
NOT_NUMBERS = [
    ("fp8_e4m3fn_scaled", "weight", b"\xff"),
    ("fp8_e5m2_scaled", "weight", b"\x7c"),
    ("fp8_e4m3fn_scaled", "weight_scale", b"\xff"),
    ("mxfp8", "weight", b"\x7f"),
    ("mxfp8", "weight_scale", b"\xff"),
    ("int8", "weight_scale", b"\xff"),
    ("int8_convrot_fast", "weight_scale", b"\xff"),
    ("fp4_scaled", "weight_scale", b"\x7f"),
    ("fp4_scaled", "weight_scale_2", b"\xff"),
    ("int4_convrot_fast", "weight_scale", b"\xff"),
    ("int4_asym_fast", "weight_s_rel", b"\x7f"),
    ("int4_asym_fast", "weight_s_channel", b"\xff"),
]


@pytest.mark.parametrize(("format_name", "suffix", "byte"), NOT_NUMBERS)
def test_stored_codes_and_scales_that_are_no_numbers_are_named_at_load(host, tmp_path, format_name, suffix, byte):
    path = quantized_file(tmp_path, format_name)
    built(host, path)
    name = f"{LAYER}.{suffix}"
    count = open_checkpoint(path).entries[name].dtype.itemsize
    with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
        built(host, damaged(path, name, byte, count))


@pytest.mark.parametrize(("format_name", "suffix", "byte"), NOT_NUMBERS)
def test_and_when_such_a_file_is_quantized_further(host, tmp_path, format_name, suffix, byte):
    tensors = load_file(quantized_file(tmp_path, format_name))
    tensors["blocks.0.self_attn.q.weight"] = torch.randn(256, 256).bfloat16()
    for name in [name for name in tensors if name.startswith("blocks.0.self_attn.q.weight_")]:
        del tensors[name]
    del tensors["blocks.0.self_attn.q.comfy_quant"]
    path, name = save(tensors, tmp_path / "partly.safetensors"), f"{LAYER}.{suffix}"
    count = open_checkpoint(path).entries[name].dtype.itemsize
    planned = host.preparing.plan_diffusion_model(damaged(path, name, byte, count), host.preparing.Request("int8"))
    with pytest.raises(CheckpointError, match=rf"partly.safetensors: {name} holds NaN or Inf"):
        host.preparing.prepared_file(planned)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", KEPT, "head.modulation"])
def test_a_16_bit_file_that_is_loaded_as_it_is_is_looked_at_too(host, tmp_path, name):
    path = save(tiny.wan_tensors(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=rf"wan.safetensors: {name} holds NaN or Inf"):
        built(host, damaged(path, name, b"\xff", 2))


def test_a_file_is_looked_at_once_and_one_of_the_cache_was_when_it_was_written(host, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("lowbit.ops.finite._look", lambda piece: looked.extend(name for _, name in piece.members))
    path = save(tiny.wan_tensors(), tmp_path / "wan.safetensors")
    built(host, path)
    assert {name for name, tensor in tiny.wan_tensors().items() if tensor.is_floating_point()} == set(looked)
    looked.clear()
    built(host, path)
    cached = host.preparing.prepared_file(host.preparing.plan_diffusion_model(path, host.preparing.Request("int8")))
    looked.clear()
    built(host, cached)
    assert looked == []


def sample(patcher, steps=1):
    import comfy.sample

    latent = torch.zeros(1, 16, 1, 8, 8)
    text = [[torch.zeros(1, 4, tiny.WAN.text), {}]]
    return comfy.sample.sample(
        patcher, latent, steps, 1.0, "euler", "simple", text, text, latent, seed=1, disable_pbar=True
    )  # fmt: skip


def test_a_large_file_is_looked_at_while_it_is_used_and_said_before_anything_is_made_of_it(host, tmp_path, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path, name = quantized_file(tmp_path, "fp8_e4m3fn_scaled"), f"{LAYER}.weight"
    good = host.loading.load_diffusion_model(str(path))
    sample(good.clone())
    bad = host.loading.load_diffusion_model(str(damaged(path, name, b"\xff")))
    planned = host.preparing.plan_diffusion_model(path, host.preparing.Request("none"))
    for patcher in (bad, bad.clone(), bad, host.quantizing.quantize_model(good, planned)):
        comfy.model_management.load_models_gpu([patcher])
        with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
            sample(patcher)
        # As a node does that saves a model.
        with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
            comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)


def test_another_large_file_is_judged_when_its_model_is_put_on_its_device(host, tmp_path, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path, name = save(tiny.infinitetalk_tensors(), tmp_path / "talk.safetensors", {}), "audio_proj.proj1.weight"
    bad = host.loading.load_model_patch(str(damaged(path, name, b"\xff", 2)))
    with pytest.raises(CheckpointError, match=rf"talk.safetensors: {name} holds NaN or Inf"):
        comfy.model_management.load_models_gpu([bad])


def test_a_large_text_encoder_that_stays_in_main_memory_is_judged_at_once(host, tmp_path, monkeypatch):
    import comfy.sd

    from testing.shims import detection

    detection.install(monkeypatch.setattr)
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path = save(tiny.umt5_tensors(), tmp_path / "umt5.safetensors", {})
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    with pytest.raises(CheckpointError, match=rf"umt5.safetensors: {name} holds NaN or Inf"):
        host.loading.load_text_encoder([str(damaged(path, name, b"\xff", 2))], comfy.sd.CLIPType.WAN)


@pytest.fixture
def evaluations(monkeypatch):
    """One entry for each evaluation of a model that is over."""
    import comfy.model_base

    over, evaluate = [], comfy.model_base.BaseModel._apply_model
    monkeypatch.setattr(
        comfy.model_base.BaseModel,
        "_apply_model",
        lambda *args, **kwargs: [evaluate(*args, **kwargs), over.append(1)][0],
    )
    return over


def test_a_large_diffusion_model_is_looked_at_once_its_weights_were_used(host, tmp_path, monkeypatch, evaluations):
    """Beside the first evaluation, which brings them to the GPU, a look would hold that one up."""
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    looked, look = [], finite._look
    monkeypatch.setattr(finite, "_look", lambda piece: looked.append(len(evaluations)) or look(piece))
    patcher = host.loading.load_diffusion_model(str(save(tiny.wan_tensors(), tmp_path / "wan.safetensors")))
    assert not looked
    sample(patcher, steps=3)
    assert looked
    assert min(looked) == 1
    count = len(looked)
    sample(patcher, steps=3)
    assert len(looked) == count, "once"


def test_what_was_found_is_said_in_the_step_that_finds_it_ready(host, tmp_path, monkeypatch, evaluations):
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    monkeypatch.setattr(finite.FiniteCheck, "answered", property(lambda check: not futures.wait(check._looks).not_done))
    path = damaged(save(tiny.wan_tensors(), tmp_path / "wan.safetensors"), KEPT, b"\xff", 2)
    with pytest.raises(CheckpointError, match=f"{KEPT} holds NaN or Inf"):
        sample(host.loading.load_diffusion_model(str(path)), steps=9)
    assert len(evaluations) == 1


def test_evaluations_at_once_begin_one_look(host, monkeypatch):
    from lowbit.host.weights import checked

    begun = []

    class Slow(finite.FiniteCheck):
        def __init__(self, *args):
            begun.append(threading.Event().wait(0.05))
            super().__init__(*args)

    monkeypatch.setattr(checked, "FiniteCheck", Slow)
    check = checked.NumbersCheck("a file", (), {}, {"a": torch.ones(4)}, {}, diffusion_model=True)
    with futures.ThreadPoolExecutor(4) as threads:
        assert [made.result() for made in [threads.submit(check._evaluated, int) for _ in range(4)]] == [0] * 4
    assert len(begun) == 1


def test_a_large_text_encoder_is_looked_at_while_core_builds_it(host, tmp_path, monkeypatch):
    import comfy.sd

    from testing.shims import detection

    detection.install(monkeypatch.setattr)
    looked, build = threading.Event(), comfy.sd.load_text_encoder_state_dicts
    monkeypatch.setattr(finite, "_look", lambda piece: looked.set())
    monkeypatch.setattr(
        comfy.sd, "load_text_encoder_state_dicts", lambda *args, **kwargs: looked.wait(10) and build(*args, **kwargs)
    )
    path = save(tiny.umt5_tensors(), tmp_path / "umt5.safetensors", {})
    host.loading.load_text_encoder([str(path)], comfy.sd.CLIPType.WAN)
    assert looked.is_set()


def test_of_a_file_that_main_memory_cannot_hold_the_scales_are_looked_at(host, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_TENSOR", 1024)
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=0))
    path = quantized_file(tmp_path, "fp8_e4m3fn_scaled")
    built(host, damaged(path, f"{LAYER}.weight", b"\xff"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight_scale holds NaN or Inf"):
        built(host, damaged(path, f"{LAYER}.weight_scale", b"\xff", 4))


def test_another_part_of_a_checkpoint_decides_nothing(host, tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tiny.wan_tensors().items()}
    tensors["first_stage_model.x.weight"] = torch.full((4, 4), torch.nan)
    built(host, save(tensors, tmp_path / "all.safetensors"))
