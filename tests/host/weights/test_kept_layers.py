"""What each architecture keeps: ComfyUI's classes at their real sizes on the meta device, and a forward of tiny ones."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace

import pytest
import torch

from lowbit.ops.diffusion_names import tables
from lowbit.ops.keep_rules import KEEP, QUANTIZE
from testing.measure import relative_error
from testing.tiny.architectures import ARCHITECTURES

ABOUT_A_LAYER = re.compile(r"\.\d+(?=\.|$)")
SIXTEEN, EIGHT, FOUR = 16, 8, 4

# In a model of 4 bits: a layer without its numbers, and the bits it has.
EXPECTED: dict[str, dict[str, int]] = {
    "Wan 2.2 T2V 14B": {"head.head": SIXTEEN, "time_projection": SIXTEEN, "blocks.self_attn.q": FOUR},
    "Wan VACE": {
        "vace_blocks.before_proj": SIXTEEN,
        "vace_blocks.after_proj": SIXTEEN,
        "vace_blocks.self_attn.q": FOUR,
    },
    "Wan Animate 2": {"img_emb.proj": SIXTEEN, "head.head": SIXTEEN, "blocks.cross_attn.k_img": FOUR},
    "Wan SCAIL 2": {"img_emb.proj": SIXTEEN, "time_embedding": SIXTEEN, "blocks.ffn": FOUR},
    "WanDancer": {
        "img_emb_refimage.proj": SIXTEEN,
        "head_global.head": SIXTEEN,
        "music_projection": SIXTEEN,
        "music_encoder.linear1": SIXTEEN,
        # Attention of the model's own width.
        "music_injector.injector.q": FOUR,
    },
    "Qwen-Image": {
        "img_in": SIXTEEN,
        "proj_out": SIXTEEN,
        # A third of each block.
        "transformer_blocks.img_mod": EIGHT,
        "transformer_blocks.txt_mod": EIGHT,
        "transformer_blocks.attn.to_q": FOUR,
    },
    "Qwen-Image Layered": {"time_text_embed.addition_t_embedding": SIXTEEN, "transformer_blocks.img_mod": EIGHT},
    "Flux": {
        "vector_in.in_layer": SIXTEEN,
        "final_layer.adaLN_modulation": SIXTEEN,
        "double_blocks.img_mod.lin": EIGHT,
        "double_blocks.txt_mod.lin": EIGHT,
        "single_blocks.modulation.lin": EIGHT,
        "single_blocks.linear1": FOUR,
    },
    "Flux 2": {
        "double_stream_modulation_img.lin": SIXTEEN,
        "single_stream_modulation.lin": SIXTEEN,
        "double_blocks.img_attn.qkv": FOUR,
    },
    "Chroma": {
        "distilled_guidance_layer.in_proj": SIXTEEN,
        "distilled_guidance_layer.layers.in_layer": SIXTEEN,
        "double_blocks.img_attn.qkv": FOUR,
    },
    "Chroma Radiance": {"distilled_guidance_layer.layers.out_layer": SIXTEEN, "nerf_image_embedder.embedder": SIXTEEN},
    "HunyuanVideo": {
        "txt_in.input_embedder": SIXTEEN,
        # A transformer, though it stands in front.
        "txt_in.individual_token_refiner.blocks.mlp": FOUR,
        "double_blocks.img_mod.lin": EIGHT,
    },
    "HunyuanVideo 1.5": {
        "vision_in.proj": SIXTEEN,
        "byt5_in.fc1": SIXTEEN,
        "cond_type_embedding": SIXTEEN,
        "double_blocks.txt_mod.lin": EIGHT,
    },
    "HunyuanImage 2.1": {"byt5_in.fc1": SIXTEEN, "double_blocks.img_mod.lin": EIGHT},
    "LTXV": {"patchify_proj": SIXTEEN, "adaln_single.linear": SIXTEEN, "caption_projection.linear_1": SIXTEEN},
    "LTX-2": {
        "audio_patchify_proj": SIXTEEN,
        "audio_adaln_single.linear": SIXTEEN,
        "audio_caption_projection.linear_1": SIXTEEN,
        "audio_proj_out": SIXTEEN,
        "audio_embeddings_connector.transformer_1d_blocks.attn1.to_q": FOUR,
        "transformer_blocks.audio_ff.net.proj": FOUR,
    },
    "Z-Image": {
        "layers.adaLN_modulation": SIXTEEN,
        "cap_embedder": SIXTEEN,
        "final_layer.linear": SIXTEEN,
        "layers.attention.qkv": FOUR,
        "context_refiner.attention.out": FOUR,
    },
    "Lumina 2": {"layers.adaLN_modulation": EIGHT, "cap_embedder": SIXTEEN, "layers.feed_forward.w1": FOUR},
    "SD3.5 Large": {
        "context_embedder": SIXTEEN,
        "joint_blocks.x_block.adaLN_modulation": EIGHT,
        "joint_blocks.x_block.mlp.fc1": FOUR,
    },
    "HiDream": {
        "double_stream_blocks.block.adaLN_modulation": EIGHT,
        "double_stream_blocks.block.ff_i.gate": SIXTEEN,
        "final_layer.linear": SIXTEEN,
    },
    "HiDream-O1": {"final_layer2.linear": SIXTEEN, "language_model.embed_tokens": SIXTEEN, "x_embedder.proj1": SIXTEEN},
    "PixelDiT": {
        "patch_blocks.adaLN_modulation_img": EIGHT,
        "patch_blocks.mlp_x.w1": FOUR,
        "s_embedder.proj": SIXTEEN,
        "pixel_blocks.attn.qkv": SIXTEEN,
        "pixel_blocks.compress_to_attn": SIXTEEN,
        "pixel_blocks.adaLN_modulation_msa": EIGHT,
    },
    "Cosmos Predict 2": {
        "blocks.adaln_modulation_mlp": EIGHT,
        "x_embedder.proj": SIXTEEN,
        # In a sequence, whose number looks like a block's.
        "t_embedder.linear_1": SIXTEEN,
        "blocks.mlp.layer1": FOUR,
    },
    "Anima": {"llm_adapter.embed": SIXTEEN, "blocks.adaln_modulation_mlp": EIGHT},
    "Krea 2": {
        "first": SIXTEEN,
        "last.linear": SIXTEEN,
        "tproj": SIXTEEN,
        "txtmlp": SIXTEEN,
        "txtfusion.refiner_blocks.attn.wq": SIXTEEN,
        "blocks.mlp.up": FOUR,
    },
    "Ernie": {
        "text_proj": SIXTEEN,
        "final_linear": SIXTEEN,
        "adaLN_modulation": SIXTEEN,
        "layers.mlp.linear_fc2": FOUR,
    },
    "AuraFlow": {
        "cond_seq_linear": SIXTEEN,
        "final_linear": SIXTEEN,
        "modF": SIXTEEN,
        "double_layers.modC": EIGHT,
        "double_layers.modX": EIGHT,
        "single_layers.modCX": EIGHT,
    },
    "Mochi": {"t5_yproj": SIXTEEN, "blocks.mod_x": EIGHT, "blocks.mod_y": EIGHT, "blocks.mlp_x.w1": FOUR},
    "Ideogram 4": {
        "input_proj": SIXTEEN,
        "llm_cond_proj": SIXTEEN,
        "adaln_proj": SIXTEEN,
        "layers.adaln_modulation": SIXTEEN,
        "embed_image_indicator": SIXTEEN,
    },
    "Kandinsky 5 Pro": {
        "out_layer.out_layer": SIXTEEN,
        "visual_transformer_blocks.visual_modulation.out_layer": EIGHT,
        "text_transformer_blocks.text_modulation.out_layer": EIGHT,
    },
    "MiniMax-H3": {
        "condition_proj": SIXTEEN,
        # 24 of 62 GiB.
        "blocks.adaln_proj.linear": EIGHT,
        "video_patch_proj": SIXTEEN,
        "audio_patch_proj": SIXTEEN,
        "final_layer.video_out": SIXTEEN,
        "blocks.mlp.fc1": FOUR,
    },
    "Boogu": {"double_stream_layers.img_norm1.linear": EIGHT, "double_stream_layers.instruct_norm2.linear": EIGHT},
    "OmniGen 2": {"layers.norm1.linear": EIGHT, "layers.attn.to_q": FOUR},
    "ACE-Step 1.0": {"lyric_embs": SIXTEEN, "t_block": SIXTEEN, "transformer_blocks.attn.to_q": FOUR},
    "ACE-Step 1.5": {
        "tokenizer.attention_pooler.layers.self_attn.q_proj": SIXTEEN,
        "decoder.layers.self_attn.q_proj": FOUR,
    },
    "SDXL": {
        "time_embed": SIXTEEN,
        "label_emb": SIXTEEN,
        "input_blocks.emb_layers": SIXTEEN,
        # All of its group's blocks goes through it.
        "input_blocks.proj_in": SIXTEEN,
        "middle_block.proj_out": SIXTEEN,
        "output_blocks.transformer_blocks.attn1.to_q": FOUR,
    },
    "SeedVR2 7B": {
        "vid_out.proj": SIXTEEN,
        "vid_in.proj": SIXTEEN,
        "emb_in.proj_out": SIXTEEN,
        # Parts of every block, whatever their names are elsewhere.
        "blocks.mlp.vid.proj_in": FOUR,
        "blocks.attn.proj_out.vid": FOUR,
    },
    "CogVideoX": {"proj_out": SIXTEEN, "blocks.norm1.linear": EIGHT, "blocks.ff_proj": FOUR},
    "Lens": {"transformer_blocks.img_mod": EIGHT, "img_in": SIXTEEN, "transformer_blocks.attn.img_qkv": FOUR},
    "Mage-Flow": {"transformer_blocks.txt_mod": EIGHT, "proj_out": SIXTEEN},
}
# A decoder whose weights a layer computes makes more of an error than any layer's own.
LIMITS = {"Chroma Radiance": 0.6}
SLOW = {"Wan Animate", "Wan HuMo", "ACE-Step 1.0", "ACE-Step 1.5", "Anima", "HiDream-O1", "Mochi"}


@functools.cache
def plan(name: str, format_name: str):
    from testing.planned import plan_of

    return plan_of(built(name), format_name)


@functools.cache
def built(name: str) -> torch.nn.Module:
    return ARCHITECTURES[name].real_sized()


def bits(layer) -> int:
    return 16 if layer.action == KEEP else 8 if "8" in layer.storage else 4


@pytest.mark.parametrize("name", EXPECTED)
def test_small_layers_that_everything_depends_on_stay_and_blocks_are_quantized(core_modules, name):
    found: dict[str, set[int]] = {}
    for layer in plan(name, "fp4_scaled").layers.values():
        found.setdefault(ABOUT_A_LAYER.sub("", layer.name), set()).add(bits(layer))
    assert {layer: found.get(layer) for layer in EXPECTED[name]} == {
        layer: {expected} for layer, expected in EXPECTED[name].items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_stays_is_a_small_part_of_every_model(core_modules, name):
    for format_name in ("int8_convrot_fast", "fp4_scaled"):
        made = plan(name, format_name)
        kept = sum(layer.nbytes_after for layer in made.layers.values() if layer.action == KEEP)
        assert 0 < kept < 0.13 * made.nbytes_before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_alone_keep_whatever_is_no_linear(core_modules, name):
    """The command line has no modules to ask."""
    from lowbit.host.weights.core_build import no_linears
    from testing.planned import plan_of

    model = built(name)
    weights = [key.removesuffix(".weight") for key, tensor in model.state_dict().items() if tensor.dim() == 2]
    others = no_linears(dict(model.named_modules()), weights)
    by_name = plan_of(model, "fp4_scaled", pinned=tables(weights)).layers
    assert {layer for layer in others if by_name[layer].action == QUANTIZE} == set()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("Cosmos Predict 2", "blocks.0.adaln_modulation_mlp.1"), ("Lumina 2", "layers.0.adaLN_modulation.1")],
)
def test_modulation_that_is_worth_its_bytes_in_8_bits_stays_in_16(core_modules, name, layer):
    assert bits(plan(name, "fp8_e4m3fn_scaled").layers[layer]) == SIXTEEN
    assert bits(plan(name, "int4_asym_fast").layers[layer]) == EIGHT


def test_large_modulation_takes_the_models_own_8_bits(core_modules):
    layer = plan("Flux", "fp8_e4m3fn_scaled").layers["double_blocks.0.img_mod.lin"]
    assert (layer.storage, layer.weight_format) == ("float8_e4m3fn", "fp8_e4m3fn_scaled")


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in SLOW])
def test_a_tiny_model_in_4_bits_computes_what_the_plain_one_does(core_modules, name):
    from testing.planned import plan_of, with_plan

    architecture = ARCHITECTURES[name]
    weights, plain = architecture.weights(), architecture.small()
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [key for key in missing if key.endswith("weight")]
    rules = [replace(rule, most_added=math.inf) for rule in plan(name, "fp4_scaled").rules]
    made = plan_of(plain, "fp4_scaled", rules)
    assert any(layer.action == QUANTIZE for layer in made.layers.values())
    expected = architecture.run(plain)
    assert expected.isfinite().all()
    assert expected.std() > 0.1
    error = relative_error(architecture.run(with_plan(architecture, weights, made)), expected)
    assert 0.005 < error < LIMITS.get(name, 0.2)
