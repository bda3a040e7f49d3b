"""Models as other tools store them, planned and loaded by core under its own names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from testing.measure import relative_error
from testing.tiny import nunchaku_files
from testing.tiny.foreign_files import SCHEMES, stored_as
from testing.tiny.tensors import linear_names

from .test_core_build import built, in_diffusers_names


@pytest.fixture(scope="module")
def flux(host, tmp_path_factory):
    """A Flux of core's in its own names, and nunchaku's files of it."""
    folder = tmp_path_factory.mktemp("flux")
    ours = {name: tensor / tensor.shape[-1] ** 0.5 for name, tensor in built("flux").items()}
    files = {"ours": ours, "older": nunchaku_files.flux(ours), "fp4": nunchaku_files.flux(ours, fp4=True, older=False)}
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("format", ["none", "int8"])
@pytest.mark.parametrize("file", ["older", "fp4"])
def test_a_flux_of_nunchaku_is_core_s_flux(host, flux, file, format):
    planned = host.preparing.plan_diffusion_model(flux / f"{file}.safetensors", host.preparing.Request(format))
    assert "svdquant of nunchaku in" in planned.report
    assert planned.plan.layers["double_blocks.0.img_attn.qkv"].action == ("quantize" if format == "int8" else "keep")
    prepared = host.preparing.prepared_file(planned)
    assert prepared != flux / f"{file}.safetensors"
    plain = host.loading.load_diffusion_model(str(flux / "ours.safetensors"))
    loaded = host.loading.load_diffusion_model(str(prepared))
    layers = 0
    for name, module in plain.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear) or hasattr(module, "in_features"):
            x = torch.randn(4, module.weight.shape[1])
            other = loaded.model.diffusion_model.get_submodule(name)
            assert relative_error(other(x), module(x)) < 0.25, name
            layers += 1
    assert layers > 20


def test_a_flux_of_bitsandbytes_in_diffusers_names_is_joined_as_core_joins_it(host, flux, tmp_path):
    theirs = in_diffusers_names("flux", load_file(flux / "ours.safetensors"))
    stored, plain = stored_as(theirs, linear_names(theirs, ("transformer_blocks.",)), SCHEMES["nf4"])
    for name, tensors in (("nf4", stored), ("plain", plain)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    planned = [
        host.preparing.plan_diffusion_model(tmp_path / f"{name}.safetensors", host.preparing.Request("int8"))
        for name in ("nf4", "plain")
    ]
    assert "layers are NF4 of bitsandbytes" in planned[0].report
    made = [load_file(host.preparing.prepared_file(plan)) for plan in planned]
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        if tensor.dtype == torch.int8:
            assert (tensor.int() - made[1][name].int()).abs().max() <= 1, name


def test_a_layer_that_is_not_whole_is_said_by_the_loader(host, tmp_path):
    parts, _ = nunchaku_files.svdquant(torch.randn(128, 128), None, fp4=False)
    del parts["proj_up"]
    save_file({f"blocks.0.q.{suffix}": part for suffix, part in parts.items()}, tmp_path / "cut.safetensors")
    with pytest.raises(
        CheckpointError, match="cut.safetensors: the layer 'blocks.0.q' is svdquant .* 'proj_up' is missing"
    ):
        host.preparing.plan_diffusion_model(tmp_path / "cut.safetensors", host.preparing.Request("int8"))
