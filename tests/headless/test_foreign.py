"""Files of other tools through real ComfyUI: what they make is what the numbers they stand for make."""

from __future__ import annotations

import pytest
import torch

from testing import graphs, tiny
from testing.cases import CASES
from testing.measure import relative_error
from testing.tiny import nunchaku_files
from testing.tiny.foreign_files import SCHEMES, stored_as
from testing.tiny.tensors import linear_names

WIDTH = 4096


@pytest.mark.parametrize(("scheme", "format"), [("fp8 blocks", "int8"), ("nf4", "none")])
def test_a_diffusion_model_gives_what_its_decoded_numbers_give(bench, scheme, format):
    folder = bench.models / "diffusion_models"
    tensors = tiny.wan_tensors(tiny.WAN_PLAIN)
    theirs, plain = stored_as(tensors, linear_names(tensors), SCHEMES[scheme])
    kept = {name: tensor.to(torch.bfloat16) if tensor.dim() == 2 else tensor for name, tensor in plain.items()}
    names = ("foreign.safetensors", "foreign_decoded.safetensors")
    tiny.write_file(folder / names[0], theirs)
    tiny.write_file(folder / names[1], kept if format == "none" else plain)
    bench.server.free()
    latents = [
        bench.sample(graphs.wan_t2v(graphs.load_diffusion_model(name, format), graphs.conditioning_random(WIDTH)))[
            "latent"
        ]
        for name in names
    ]
    for name in names:
        (folder / name).unlink()
    # What is kept was decoded to 16 bits.
    assert relative_error(latents[0], latents[1]) < 0.02
    assert latents[0].std() > 0.1


def test_a_qwen_image_of_nunchaku_makes_the_picture_of_the_16_bit_model(bench):
    path = bench.models / "diffusion_models" / "nunchaku_qwen_image.safetensors"
    tiny.write_file(path, nunchaku_files.qwen_image(tiny.qwen_image_tensors(), fp4=True))
    case = CASES["qwen_image"]
    graph = case.graph(None, 1)
    reference = bench.tensors(graph, value=case.value)["value"]
    value = bench.tensors(graph | {case.loader: graphs.load_diffusion_model(path.name, "int8")}, value=case.value)[
        "value"
    ]
    path.unlink()
    assert relative_error(value, reference) < 0.25
