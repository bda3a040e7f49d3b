"""What core builds of a file: diffusers' names, modules that are no Linears, dimensions that it reads off shapes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.diffusion_names import converted_model, diffusion_names, tables
from testing.tiny.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Family:
    """A model that core converts from diffusers' names.

    Attributes:
        build: makes core's model, given `device`, `dtype` and `operations`.
        names: core's map of it, diffusers' names to its own.
        called: what the command line calls it.
    """

    build: Callable[..., torch.nn.Module]
    names: Callable[[], dict[str, Any]]
    called: str


def flux(**options: Any) -> torch.nn.Module:
    return ARCHITECTURES["Flux"].build_tiny(**options)


def stable_diffusion_3(**options: Any) -> torch.nn.Module:
    return ARCHITECTURES["SD3.5 Large"].build_tiny(**options)


def aura_flow(**options: Any) -> torch.nn.Module:
    from comfy.ldm.aura.mmdit import MMDiT

    return MMDiT(
        dim=128, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=128, cond_seq_dim=2048, max_seq=16, **options
    )


def pixart(**options: Any) -> torch.nn.Module:
    from comfy.ldm.pixart.pixartms import PixArtMS

    return PixArtMS(depth=1, caption_channels=64, micro_condition=False, mlp_ratio=0.125, **options)


def z_image(**options: Any) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(
        in_channels=16,
        dim=3840,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=30,
        qk_norm=True,
        multiple_of=16,
        ffn_dim_multiplier=0.01,
        cap_feat_dim=64,
        axes_dims=[32, 48, 48],
        axes_lens=[64, 64, 64],
        z_image_modulation=True,
        pad_tokens_multiple=32,
        **options,
    )


def core_map(function: str, **config: int) -> Callable[[], dict[str, Any]]:
    def names() -> dict[str, Any]:
        import comfy.utils

        return getattr(comfy.utils, function)(config)

    return names


FAMILIES = {
    "flux": Family(flux, core_map("flux_to_diffusers", depth=2, depth_single_blocks=2, hidden_size=256), "Flux"),
    "sd3": Family(stable_diffusion_3, core_map("mmdit_to_diffusers", depth=4, num_blocks=4), "Stable Diffusion 3"),
    "aura_flow": Family(aura_flow, core_map("auraflow_to_diffusers", n_double_layers=1, n_layers=3), "AuraFlow"),
    "pixart": Family(pixart, core_map("pixart_to_diffusers", depth=1), "PixArt"),
    "z_image": Family(z_image, core_map("z_image_to_diffusers", n_layers=1, dim=3840), "Z-Image"),
}


def built(family: str) -> dict[str, torch.Tensor]:
    """Random weights of core's model under its own names."""
    import comfy.ops

    torch.manual_seed(3)
    model = FAMILIES[family].build(device="meta", dtype=torch.bfloat16, operations=comfy.ops.manual_cast)
    return {name: torch.randn(tensor.shape).bfloat16() for name, tensor in model.state_dict().items()}


def in_diffusers_names(family: str, native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors, taken = {}, set()
    for name, target in FAMILIES[family].names().items():
        ours, offset, change = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        # Some of core's parts have two names in diffusers' versions.
        place = (ours, 0 if offset is None else offset[1])
        if place in taken or "to_qkv_mlp_proj" in name:
            continue
        taken.add(place)
        if ours not in native or (offset is not None and native[ours].shape[0] < offset[1] + offset[2]):
            continue
        part = native[ours] if offset is None else native[ours].narrow(*offset)
        # The one change that core makes swaps halves: its own reverse.
        tensors[name] = (change(part) if change is not None else part).contiguous()
    return tensors


@pytest.fixture(scope="module")
def files(host, tmp_path_factory):
    """The families' weights in core's names, and files in diffusers' names."""
    folder = tmp_path_factory.mktemp("diffusers")
    natives = {}
    for family in FAMILIES:
        natives[family] = built(family)
        save_file(in_diffusers_names(family, natives[family]), folder / f"{family}.safetensors")
    return folder, natives


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_diffusers_names_is_read_as_core_builds_it(host, files, family):
    import comfy.model_detection

    from lowbit.host.weights.core_build import under_core_names

    folder, natives = files
    path = folder / f"{family}.safetensors"
    checkpoint = under_core_names(open_checkpoint(path))
    expected = comfy.model_detection.convert_diffusers_mmdit(load_file(path), "")
    assert set(checkpoint.entries) == set(expected)
    for name, tensor in expected.items():
        entry = checkpoint.entries[name]
        read = checkpoint.read(name)
        assert (read.dtype, tuple(read.shape)) == (entry.dtype, entry.shape)
        assert torch.equal(read, tensor), name
        if tensor.shape == natives[family][name].shape:
            assert torch.equal(read, natives[family][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_line_knows_a_file_that_core_converts(files, family):
    folder, natives = files
    assert converted_model(load_file(folder / f"{family}.safetensors")) == FAMILIES[family].called
    assert converted_model(natives[family]) is None


def test_a_u_net_in_diffusers_names_is_planned_in_core_names(host, tmp_path):
    import comfy.utils

    from lowbit.host.weights.core_build import under_core_names

    config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10]}
    config |= {"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10}
    ours = comfy.utils.unet_to_diffusers(config)
    # Stable Diffusion 2's name of what SDXL calls `add_embedding`.
    ours = {name: core for name, core in ours.items() if not name.startswith("class_embedding")}
    tensors = {name: torch.full((2, 3), float(index)) for index, name in enumerate(ours)}
    tensors["conv_in.weight"] = torch.zeros(320, 4, 3, 3)
    tensors["add_embedding.linear_1.weight"] = torch.zeros(32, 2816)
    for name in tensors:
        if ".attn2.to_k.weight" in name:
            tensors[name] = torch.zeros(4, 2048)
    save_file(tensors, tmp_path / "sdxl.safetensors")
    checkpoint = under_core_names(open_checkpoint(tmp_path / "sdxl.safetensors"))
    assert set(checkpoint.entries) == set(ours.values())
    for name in tensors:
        assert torch.equal(checkpoint.read(ours[name]), tensors[name])
    assert converted_model(tensors) == "Stable Diffusion"


def test_a_quantized_file_in_diffusers_names_computes_what_the_16_bit_one_does(host, files):
    from testing.measure import relative_error

    folder, _ = files
    path = folder / "flux.safetensors"
    planned = host.preparing.plan_diffusion_model(path, host.preparing.Request("int8_convrot_fast"))
    assert planned.plan.layers["double_blocks.0.img_attn.qkv"].action == "quantize"
    plain = host.loading.load_diffusion_model(str(path))
    quantized = host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))
    assert isinstance(quantized.model.diffusion_model.double_blocks[0].img_attn.qkv, host.operations.QuantizedLinear)
    behind, planned = _quantized_behind_core(host, path)
    for patcher in (quantized, behind):
        for name, module in plain.model.diffusion_model.named_modules():
            other = patcher.model.diffusion_model.get_submodule(name)
            if isinstance(other, host.operations.QuantizedLinear):
                x = torch.randn(4, module.weight.shape[1])
                assert relative_error(other(x), module(x)) < 0.05, name


def _quantized_behind_core(host, path):
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model(str(path))
    planned = host.quantizing.plan_model(patcher, host.preparing.Request("int8_convrot_fast"))
    return host.quantizing.quantize_model(patcher, planned), planned


def test_scales_that_core_would_lose_are_refused_by_name(host, files, tmp_path):
    folder, _ = files
    tensors = load_file(folder / "flux.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "scaled.safetensors")
    for name in ("int8", "none"):
        with pytest.raises(
            CheckpointError, match="transformer_blocks.0.attn.to_q' quantized under a name of diffusers'"
        ):
            host.preparing.plan_diffusion_model(tmp_path / "scaled.safetensors", host.preparing.Request(name))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.", "net.", "model."])
def test_a_diffusion_model_is_found_under_every_prefix_of_core(host, prefix):
    import comfy.model_detection
    import comfy.utils

    names = [f"blocks.{number}.q.weight" for number in range(7)]
    tensors = {f"{prefix}{name}": torch.zeros(1) for name in names} | {"other.weight": torch.zeros(1)}
    found = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    below = comfy.utils.state_dict_prefix_replace(dict(tensors), {found: ""}, filter_keys=True) or tensors
    assert set(diffusion_names(tensors)[1]) == set(below)


def wan_s2v() -> dict[str, torch.Tensor]:
    import comfy.ops
    from comfy.ldm.wan.model import WanModel_S2V

    sizes = {"dim": 128, "ffn_dim": 256, "text_dim": 64, "num_heads": 1, "num_layers": 1, "audio_dim": 64}
    model = WanModel_S2V(
        **sizes, audio_inject_layers=[0], device="meta", dtype=torch.bfloat16, operations=comfy.ops.manual_cast
    )
    return {name: torch.randn(tensor.shape).bfloat16() * 0.02 for name, tensor in model.state_dict().items()}


def test_what_core_uses_as_a_table_is_told_from_its_code(host, tmp_path):
    tensors = wan_s2v()
    tensors["trainable_cond_mask.weight"] = torch.randn(64, 128).bfloat16()
    save_file(tensors, tmp_path / "s2v.safetensors")
    pinned = pinned_of(tmp_path / "s2v.safetensors")
    assert set(pinned) == {"trainable_cond_mask"}
    assert "Embedding" in pinned["trainable_cond_mask"]
    for name in ("fp4_scaled", "mxfp8", "int4_asym_fast", "int8"):
        request = host.preparing.Request(name, "!trainable_cond_mask\n!time_embedding")
        layers = host.preparing.plan_diffusion_model(tmp_path / "s2v.safetensors", request).plan.layers
        assert layers["trainable_cond_mask"].action == "keep"
        assert layers["time_embedding.0"].action == "quantize"


def test_a_model_that_asks_for_numbers_while_it_is_built_tells_its_modules(host, tmp_path):
    """ACE-Step 1.5 counts its codes."""
    save_file(ARCHITECTURES["ACE-Step 1.5"].weights(), tmp_path / "ace.safetensors")
    pinned = pinned_of(tmp_path / "ace.safetensors")
    assert not [layer for layer in pinned if "q_proj" in layer]


def pinned_of(path):
    from lowbit.host.weights.core_build import pinned_layers

    pinned = pinned_layers(open_checkpoint(path))
    assert pinned is not None
    return pinned


def test_what_core_takes_apart_when_it_loads_is_not_quantized(host):
    """HunyuanVideo's names are changed, scales and all; what PixelDiT's loading splits would lose them."""
    import comfy.supported_models

    from lowbit.host.weights.core_build import _landed

    config = comfy.supported_models.HunyuanVideo
    meta = {
        name: torch.empty(64, 64, device="meta")
        for name in ("double_blocks.0.img_mod.linear.weight", "double_blocks.0.img_mlp.fc1.weight")
    }
    landed = _landed(meta, lambda given: config.process_unet_state_dict(None, given))
    assert landed["double_blocks.0.img_mod.linear"] == "double_blocks.0.img_mod.lin"
    split = {"a.weight": torch.empty(6, 2, device="meta"), "b.weight": torch.empty(6, 2, device="meta")}

    def process(given):
        weight = given.pop("a.weight")
        return {**given, "a1.weight": weight[:3], "a2.weight": weight[3:]}

    assert _landed(split, process) == {"b": "b"}


def test_a_text_encoders_tables_are_never_quantized(host, tmp_path):
    """Gemma 3's vision tower, and a CLIP model in its trainer's names, of which core takes some layers apart."""
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 256).bfloat16(),
        "model.lm_head.weight": torch.randn(64, 256).bfloat16(),
        "vision_model.embeddings.position_embedding.weight": torch.randn(64, 256).bfloat16(),
    }
    save_file(tensors, tmp_path / "gemma.safetensors")
    for name in ("mxfp8", "fp4", "int8"):
        planned = host.preparing.plan_text_encoder(
            tmp_path / "gemma.safetensors", host.preparing.Request(name, "!position_embedding\n!lm_head\n!q_proj")
        )
        kept = {layer.name for layer in planned.plan.layers.values() if layer.action == "keep"}
        assert kept == {"vision_model.embeddings.position_embedding", "model.lm_head"}


def test_every_embedding_of_core_is_known_by_its_name(host):
    """Read off core's sources: what text encoders and the command line go by."""
    import ast
    from pathlib import Path

    import comfy

    folder = Path(next(iter(comfy.__path__)))
    found = set()
    for part in ("text_encoders", "ldm", "audio_encoders", "clip_model.py"):
        for source in [folder / part] if part.endswith(".py") else (folder / part).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    called = node.value.func
                    attribute = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                    if attribute in ("Embedding", "ScaledEmbedding") and isinstance(node.targets[0], ast.Attribute):
                        found.add(node.targets[0].attr)
    assert {"position_embedding", "shared", "embed_tokens", "lyric_embs", "trainable_cond_mask"} <= found
    assert found == set(tables(found))
    linears = ("self_attn.q_proj", "ffn.0", "time_embedding.0", "text_embedding.2", "proj", "x_embedder", "to_out.0")
    assert not tables(f"blocks.0.{name}" for name in linears)


@pytest.mark.parametrize(
    "encoder",
    [
        "t5.T5",
        "qwen3vl.Qwen3VL",
        "qwen35.Qwen35",
        "gemma4.Gemma4_E2B",
        "llama.Gemma3_4B_Vision",
        "jina_clip_2.XLMRobertaModel",
    ],
)
def test_a_text_encoders_names_say_of_each_matrix_what_its_modules_say(host, encoder):
    """Core builds an encoder only as it loads it, so that plans of text encoders go by names."""
    import comfy.ops

    from lowbit.host.weights.core_build import Numberless

    module, name = encoder.split(".")
    kind = getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name)
    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    # T5's sizes come with its file, a tokenizer's way.
    config = {"num_layers": 2, "d_model": 64, "d_kv": 64, "d_ff": 64, "num_heads": 1, "vocab_size": 99}
    config |= {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5"}
    with Numberless():
        model = kind(config if module == "t5" else {}, torch.bfloat16, torch.device("meta"), operations)
    linears = {layer for layer, found in model.named_modules() if isinstance(found, operations.Linear)}
    weights = {key: tensor for key, tensor in model.state_dict().items() if key.endswith(".weight")}
    matrices = {key.removesuffix(".weight") for key, tensor in weights.items() if tensor.dim() == 2}
    assert len(linears) > 10
    assert set(tables(matrices | linears)) == matrices - linears


def test_dimensions_that_core_reads_are_not_packed(host, tmp_path):
    """`!txt_in` in 4 bits: core would read half of the text's width."""
    folder = tmp_path
    save_file(built("flux"), folder / "flux.safetensors")
    rules = "!txt_in\n!img_in"
    planned = host.preparing.plan_diffusion_model(
        folder / "flux.safetensors", host.preparing.Request("fp4_scaled", rules)
    )
    for name in ("txt_in", "img_in"):
        assert planned.plan.layers[name].action == "keep"
        assert "dimensions" in planned.plan.layers[name].reason
    eight_bits = host.preparing.plan_diffusion_model(folder / "flux.safetensors", host.preparing.Request("int8", rules))
    assert eight_bits.plan.layers["txt_in"].action == "quantize"
    loaded = host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))
    width = ARCHITECTURES["Flux"].tiny["context_in_dim"]
    assert loaded.model.model_config.unet_config["context_in_dim"] == width
    assert math.isfinite(float(loaded.model.diffusion_model.txt_in(torch.randn(2, width)).float().norm()))
