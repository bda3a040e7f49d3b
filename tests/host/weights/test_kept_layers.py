"""What stays in 16 bits of models without a row of their own: core's classes at their real sizes, on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowbit.ops.keep_rules import GENERIC, KEEP, affordable, detect_family, first_match

ABOUT_A_LAYER = re.compile(r"\.\d+(?=\.|$)")


def flux(**options: Any) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux

    sizes = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24}
    blocks = {"depth": 19, "depth_single_blocks": 38, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": True}
    inputs = {"vec_in_dim": 768, "context_in_dim": 4096, "axes_dim": [16, 56, 56], "theta": 10000, "txt_ids_dims": []}
    return Flux(image_model="flux", **sizes, **blocks, **inputs, **options)


def ltx_audio_video(**options: Any) -> torch.nn.Module:
    from comfy.ldm.lightricks.av_model import LTXAVModel

    return LTXAVModel(**options)


def z_image(**options: Any) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    sizes = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "qk_norm": True}
    parts = {"ffn_dim_multiplier": 8 / 3, "cap_feat_dim": 2560, "z_image_modulation": True}
    return NextDiT(axes_dims=[32, 48, 48], axes_lens=[64, 64, 64], multiple_of=256, **sizes, **parts, **options)


def sdxl(**options: Any) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sizes = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4], "context_dim": 2048}
    depth = {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    parts = {"use_linear_in_transformer": True, "use_spatial_transformer": True, "use_temporal_attention": False}
    heads = {"num_classes": "sequential", "adm_in_channels": 2816, "num_head_channels": 64}
    return UNetModel(
        image_size=32,
        num_res_blocks=[2, 2, 2],
        transformer_depth_middle=10,
        **sizes,
        **depth,
        **parts,
        **heads,
        **options,
    )


CASES: dict[str, tuple[Callable[..., torch.nn.Module], set[str], set[str]]] = {
    # A model, layers that stay, layers that are quantized: numbers left out.
    "Flux": (
        flux,
        {"img_in", "txt_in", "vector_in.in_layer", "final_layer.linear", "single_blocks.modulation.lin"},
        # 4 GiB of 22.
        {"double_blocks.img_mod.lin", "double_blocks.img_attn.qkv", "single_blocks.linear1"},
    ),
    "LTX audio-video": (
        ltx_audio_video,
        {
            "patchify_proj",
            "audio_patchify_proj",
            "adaln_single.linear",
            "caption_projection.linear_1",
            "audio_proj_out",
        },
        {"transformer_blocks.attn1.to_q", "transformer_blocks.audio_ff.net.proj"},
    ),
    "Z-Image": (
        z_image,
        {"layers.adaLN_modulation", "cap_embedder", "t_embedder.mlp", "final_layer.linear"},
        {"layers.attention.qkv", "layers.feed_forward.w1", "context_refiner.attention.out"},
    ),
    "SDXL": (
        sdxl,
        {"time_embed", "label_emb", "input_blocks.emb_layers", "middle_block.emb_layers"},
        # Parts of every block, whatever their names are elsewhere.
        {"input_blocks.proj_in", "input_blocks.proj_out", "output_blocks.transformer_blocks.attn1.to_q"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_small_layers_that_everything_depends_on_stay_and_blocks_are_quantized(core_modules, name):
    import comfy.ops

    build, stays, goes = CASES[name]
    model = build(device="meta", dtype=torch.bfloat16, operations=comfy.ops.manual_cast)
    weights = {key.removesuffix(".weight"): tensor for key, tensor in model.state_dict().items()}
    sizes = {key: tensor.numel() for key, tensor in weights.items() if tensor.dim() == 2}
    assert detect_family(weights) is GENERIC
    rules = affordable(GENERIC.rules, sizes)
    found = {key: first_match(rules, key) for key in sizes}
    kept = {key for key, rule in found.items() if rule is not None and rule.action == KEEP}
    spoken_of = {ABOUT_A_LAYER.sub("", key): key in kept for key in sizes}
    assert {key: spoken_of[key] for key in stays} == dict.fromkeys(stays, True)
    assert {key: spoken_of[key] for key in goes} == dict.fromkeys(goes, False)
    assert sum(sizes[key] for key in kept) < 0.12 * sum(sizes.values())
