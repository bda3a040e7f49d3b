"""GGUF files through real ComfyUI: what they make is what their decoded numbers make from safetensors."""

from __future__ import annotations

import pytest
import torch

from testing import graphs, tiny
from testing.measure import relative_error
from testing.tiny import gguf_files

pytest.importorskip("gguf")

WIDTH = 4096


@pytest.mark.parametrize("format", ["int8", "auto", "none"])
def test_a_diffusion_model_gives_what_its_decoded_numbers_give(bench, format):
    folder = bench.models / "diffusion_models"
    decoded = gguf_files.write(folder / "tiny_wan.gguf", "wan", tiny.wan_tensors(tiny.WAN_PLAIN))
    kept = {name: tensor.to(torch.bfloat16) if tensor.dim() == 2 else tensor for name, tensor in decoded.items()}
    tiny.write_file(folder / "tiny_wan_decoded.safetensors", kept if format == "none" else decoded)
    bench.server.free()
    latents = [
        bench.sample(graphs.wan_t2v(graphs.load_diffusion_model(name, format), graphs.conditioning_random(WIDTH)))[
            "latent"
        ]
        for name in ("tiny_wan.gguf", "tiny_wan_decoded.safetensors")
    ]
    # What is kept was decoded to 16 bits.
    assert relative_error(latents[0], latents[1]) < 0.02
    assert latents[0].std() > 0.1


def test_a_text_encoder_with_its_vision_tower_gives_what_its_decoded_numbers_give(bench):
    folder = bench.models / "text_encoders"
    tensors = tiny.qwen25_tensors()
    theirs = gguf_files.llama_names("qwen2vl", tensors)
    language = gguf_files.write(
        folder / "tiny_vl-Q8_0.gguf", "qwen2vl", {theirs[name]: tensors[name] for name in theirs}, None
    )
    gguf_files.write(folder / "tiny_vl-mmproj.gguf", "clip", gguf_files.vision_parts(tensors), None)
    assert len(language) == len(theirs)
    encoded = []
    for name in ("tiny_vl-Q8_0.gguf", "qwen25_vl.safetensors"):
        clip = graphs.load_text_encoder(name, "qwen_image", "int8")
        encoded.append(bench.tensors(graphs.conditioning_from_image(clip), value=["positive", 0])["value"])
    assert relative_error(encoded[0], encoded[1]) < 1e-3


def test_the_dry_run_says_what_is_decoded_of_files_in_unet_and_clip(bench):
    """The older names of core's folders."""
    folders = [bench.models / name for name in ("unet", "clip")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    tensors = tiny.qwen25_tensors()
    theirs = gguf_files.llama_names("qwen2vl", tensors)
    gguf_files.write(folders[0] / "dry.gguf", "wan", tiny.wan_tensors(tiny.WAN_PLAIN), "Q4_0")
    gguf_files.write(folders[1] / "dry_vl.gguf", "qwen2vl", {theirs[name]: tensors[name] for name in theirs})
    bench.server.free()
    loaders = {
        "Q4_0": graphs.load_diffusion_model("dry.gguf", "int8", dry_run=True),
        "Q8_0": graphs.load_text_encoder("dry_vl.gguf", "qwen_image", "int8", dry_run=True),
    }
    for kind, loader in loaders.items():
        preview = graphs.node("PreviewAny", source=["loader", 1])
        (report,) = bench.server.run({"loader": loader, "preview": preview}).outputs["preview"]["text"]
        assert f"{kind} of GGUF, which ComfyUI cannot multiply with: they are decoded and stored anew." in report
        assert "  quantized int8" in report
    for path in (folders[0] / "dry.gguf", folders[1] / "dry_vl.gguf"):
        path.unlink()


def test_gguf_files_are_offered_and_their_vision_towers_are_not(bench):
    folder = bench.models / "text_encoders"
    for name in ("offered.gguf", "offered-mmproj.gguf"):
        (folder / name).write_bytes(b"")
    options = bench.server.object_info("LowbitLoadTextEncoder")["input"]["required"]["clip_name"]
    names = options[1]["options"] if isinstance(options[0], str) else options[0]
    assert "offered.gguf" in names
    assert "offered-mmproj.gguf" not in names
    for name in ("offered.gguf", "offered-mmproj.gguf"):
        (folder / name).unlink()
