"""Without a name that one thing alone needs, that thing is left undone, and everything else works."""

from __future__ import annotations

import pkgutil
import types

import pytest
import torch

from lowbit.errors import CapabilityError
from testing import tiny


@pytest.fixture
def lose(core_modules, monkeypatch):
    """Takes a name away from ComfyUI."""

    def lost(name: str) -> None:
        holder, _, last = name.rpartition(".")
        monkeypatch.delattr(pkgutil.resolve_name(holder), last)

    return lost


def test_a_block_that_is_gone_is_not_fused(lose):
    from comfy.ldm.qwen_image.model import FeedForward

    from lowbit.host.weights.feed_forward import fuse_feed_forwards

    def blocks() -> torch.nn.ModuleList:
        return torch.nn.ModuleList(FeedForward(8, operations=torch.nn) for _ in range(3))

    assert fuse_feed_forwards(blocks()) == 3
    lose("comfy.ldm.qwen_image.model.FeedForward")
    assert fuse_feed_forwards(blocks()) == 0


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_that_are_gone_are_left_to_comfyui(lose, name):
    import comfy.ops

    from lowbit.host.weights import elementwise

    norms = torch.nn.ModuleList([comfy.ops.manual_cast.LayerNorm(8), comfy.ops.manual_cast.RMSNorm(8)])
    lose(f"comfy.ops.disable_weight_init.{name}")
    elementwise.speed_up_elementwise(norms)
    assert [isinstance(norm, elementwise._Norm) for norm in norms] == [name != "LayerNorm", name != "RMSNorm"]


@pytest.mark.parametrize("name", ["_modulate", "_apply_gate"])
def test_a_block_that_works_otherwise_is_left_to_comfyui(lose, name):
    from comfy.ldm.qwen_image.model import QwenImageTransformerBlock

    from lowbit.host.weights import elementwise

    lose(f"comfy.ldm.qwen_image.model.QwenImageTransformerBlock.{name}")
    block = torch.nn.Module.__new__(QwenImageTransformerBlock)
    torch.nn.Module.__init__(block)
    elementwise.speed_up_elementwise(block)
    assert type(block) is QwenImageTransformerBlock


FUNCTIONS = [
    "ldm.flux.layers.apply_mod",
    "ldm.flux.math.apply_rope",
    "ldm.flux.math.apply_rope1",
    "ldm.wan.model.repeat_e",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_gone_are_left_to_comfyui(lose, name):
    from lowbit.host.weights import elementwise

    lose(f"comfy.{name}")
    elementwise.speed_up_elementwise(torch.nn.Module())


@pytest.mark.parametrize(
    "name", [*FUNCTIONS, "ops.linear_input_act", "ldm.qwen_image.model.QwenImageTransformerBlock._apply_gate"]
)
def test_what_takes_more_than_it_did_is_left_to_comfyui(core_modules, monkeypatch, name):
    from comfy.ldm.qwen_image.model import QwenImageTransformerBlock

    from lowbit.host.weights import elementwise, feed_forward

    def grown(x, y, and_more=None):
        return x

    holder, _, last = f"comfy.{name}".rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(holder), last, grown)
    block = torch.nn.Module.__new__(QwenImageTransformerBlock)
    torch.nn.Module.__init__(block)
    elementwise.speed_up_elementwise(block)
    feed_forward.route_input_activations()
    assert getattr(pkgutil.resolve_name(holder), last) is grown
    assert isinstance(block, elementwise._QwenBlock) == ("Block" not in name)


@pytest.mark.parametrize("name", ["comfy.ops.linear_input_act", "comfy.ops.INPUT_ACT_EAGER"])
def test_input_activations_are_left_to_comfyui(lose, name):
    import comfy.ops

    from lowbit.host.weights import feed_forward

    lose(name)
    before = getattr(comfy.ops, "linear_input_act", None)
    feed_forward.route_input_activations()
    assert getattr(comfy.ops, "linear_input_act", None) is before


@pytest.mark.parametrize(
    "name",
    [
        "comfy.sd.detect_te_model",
        "comfy.model_detection.model_config_from_unet",
        "comfy.model_detection.convert_diffusers_mmdit",
    ],
)
def test_files_are_judged_when_they_are_loaded(lose, tmp_path, name):
    from lowbit.host.weights import architecture
    from lowbit.ops.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(tiny.write("loras/wan.safetensors", tmp_path))
    check = architecture.check_text_encoder if "sd" in name else architecture.check_diffusion_model
    with pytest.raises(Exception, match="is no"):
        check(checkpoint)
    lose(name)
    check(checkpoint)


def test_formats_are_judged_when_they_are_loaded(lose):
    from lowbit.host.weights import architecture

    layers = {"blocks.0": types.SimpleNamespace(core_format="no_such_format")}
    plan = types.SimpleNamespace(stored=types.SimpleNamespace(layers=layers), layers={})
    checkpoint = types.SimpleNamespace(path=types.SimpleNamespace(name="wan.safetensors"))
    with pytest.raises(CapabilityError, match="no_such_format"):
        architecture.check_formats(checkpoint, plan)
    lose("comfy.quant_ops.QUANT_ALGOS")
    architecture.check_formats(checkpoint, plan)


def test_a_patch_that_cannot_be_built_is_refused_by_name(lose, tmp_path):
    from lowbit.host.weights import loading

    path = tiny.write("model_patches/infinitetalk.safetensors", tmp_path)
    assert loading.load_model_patch(str(path)) is not None
    lose("comfy_extras.nodes_model_patch.MultiTalkModelPatch")
    with pytest.raises(CapabilityError, match=r"no MultiTalkModelPatch .* made for ComfyUI 0.33"):
        loading.load_model_patch(str(path))


@pytest.mark.parametrize("name", ["comfy.model_prefetch.make_prefetch_queue", "comfy.model_management.STREAMS"])
def test_nothing_is_fetched_ahead(lose, name):
    from lowbit.host.memory.fetching import BlockFetcher

    assert BlockFetcher().enabled
    lose(name)
    fetcher = BlockFetcher()
    assert not fetcher.enabled
    assert fetcher(lambda x: x + 1, torch.ones(1)).tolist() == [2.0]


def test_leftover_queues_are_comfyuis_own(lose):
    from lowbit.host.memory.streaming import forget_queues

    lose("comfy.model_prefetch.cleanup_prefetch_queues")
    forget_queues()


def test_a_server_that_cannot_be_told_is_no_server(monkeypatch):
    import sys

    from lowbit.host.server import prompt_server

    full = types.SimpleNamespace(send_sync=print, send_progress_text=print)
    for instance, expected in ((full, full), (types.SimpleNamespace(send_sync=print), None), (None, None)):
        fake = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=instance))
        monkeypatch.setitem(sys.modules, "server", fake)
        assert prompt_server() is expected
