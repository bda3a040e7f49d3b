"""The tiny checkpoints load in stock ComfyUI with core's nodes, and give finite, decodable results."""

from __future__ import annotations

import pytest

from testing import graphs

UMT5 = graphs.load_text_encoder("umt5.safetensors", "wan")
QWEN25 = graphs.load_text_encoder("qwen25_vl.safetensors", "qwen_image")


def wan(name: str) -> graphs.Graph:
    return graphs.wan_t2v(graphs.load_diffusion_model(name), graphs.conditioning_from_text(UMT5))


GRAPHS = {
    "wan_t2v": wan("wan_t2v.safetensors"),
    "wan_t2v_plain": graphs.wan_t2v(
        graphs.load_diffusion_model("wan_t2v_plain.safetensors"), graphs.conditioning_random(4096)
    ),
    "wan_t2v_small": graphs.wan_t2v(
        graphs.load_diffusion_model("wan_t2v_small.safetensors"), graphs.conditioning_random(32)
    ),
    "wan_scaled_kijai": wan("wan_t2v_scaled_fp8_kijai.safetensors"),
    "wan_scaled_comfy": wan("wan_t2v_scaled_fp8_comfy.safetensors"),
    "wan_quantization_metadata": wan("wan_t2v_quantization_metadata.safetensors"),
    "wan_i2v_21": graphs.wan_i2v(
        graphs.load_diffusion_model("wan_i2v_21.safetensors"), graphs.conditioning_from_text(UMT5), clip_vision=True
    ),
    "wan_i2v_22": graphs.wan_i2v(
        graphs.load_diffusion_model("wan_i2v_22.safetensors"), graphs.conditioning_from_text(UMT5), clip_vision=False
    ),
    "qwen_image": graphs.qwen_image(
        graphs.load_diffusion_model("qwen_image.safetensors"), graphs.conditioning_from_text(QWEN25)
    ),
    "qwen_image_edit": graphs.qwen_image(
        graphs.load_diffusion_model("qwen_image.safetensors"), graphs.conditioning_from_image(QWEN25)
    ),
    "infinitetalk": graphs.infinitetalk(
        graphs.load_diffusion_model("wan_i2v_infinitetalk.safetensors"),
        graphs.load_model_patch("infinitetalk.safetensors"),
        graphs.conditioning_from_text(UMT5),
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_tiny_checkpoint_samples_and_decodes_with_core_nodes(bench, name):
    out = bench.sample(GRAPHS[name] | graphs.decode())
    for key, tensor in out.items():
        assert tensor.isfinite().all(), key
        assert tensor.std() > 0.05, key


def test_lora_changes_the_output_with_core_nodes(bench):
    plain = bench.sample(GRAPHS["wan_t2v"])["latent"]
    with_lora = bench.sample(graphs.lora(GRAPHS["wan_t2v"], "wan.safetensors"))["latent"]
    assert (plain - with_lora).norm() / plain.norm() > 0.02
