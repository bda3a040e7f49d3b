"""What a model was built with besides its tensors is carried on: a header's config, and marker tensors."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.errors import CheckpointError

from .files import block
from .test_quantizing import quantize, without_a_file


@pytest.fixture
def with_configuration(host, tmp_path):
    """A file whose header says what its tensors do not."""
    from safetensors.torch import load_file, save_file

    from lowbit.ops.checkpoint import open_checkpoint

    source = host.folder / "wan_t2v.safetensors"
    metadata = dict(open_checkpoint(source).metadata)
    transformer = json.loads(metadata.get("config", "{}")).get("transformer", {})
    metadata["config"] = json.dumps({"transformer": {**transformer, "eps": 0.125}})
    save_file(load_file(source), tmp_path / "configured.safetensors", metadata=metadata)
    return tmp_path / "configured.safetensors"


@pytest.mark.parametrize("file_noted", [True, False])
def test_what_a_header_said_of_the_model_is_carried_on(host, with_configuration, tmp_path, monkeypatch, file_noted):
    import folder_paths

    patcher = host.loading.load_diffusion_model(str(with_configuration))
    assert patcher.model.model_config.unet_config["eps"] == 0.125
    if not file_noted:
        patcher.cached_patcher_init = None
    quantized, planned = quantize(host, patcher)
    assert quantized.model.model_config.unet_config == patcher.model.model_config.unet_config
    assert block(quantized).norm1.eps == 0.125
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    saved = host.saving.save_diffusion_model(patcher, "saved")
    again = host.loading.load_diffusion_model(str(saved))
    assert again.model.model_config.unet_config["eps"] == 0.125


@pytest.mark.parametrize("markers", [(), ("v_pred",), ("v_pred", "ztsnr"), ("edm_mean", "edm_std")])
def test_how_a_checkpoint_samples_is_carried_on(host, markers):
    """SDXL's checkpoints say so with tensors beside the diffusion model's."""
    import comfy.model_detection
    import comfy.ops
    import comfy.supported_models

    from lowbit.host.weights.told import told

    match = {"conv_in.weight": torch.empty(320, 4, 3, 3, device="meta")}
    match["add_embedding.linear_1.weight"] = torch.empty(1280, 2816, device="meta")
    match |= {f"down_blocks.0.resnets.{number}.norm1.bias": torch.empty(1, device="meta") for number in range(2)}
    for part, depth in ((1, 2), (2, 10)):
        for attention in range(2):
            for number in range(depth):
                name = f"down_blocks.{part}.attentions.{attention}.transformer_blocks.{number}.attn2.to_k.weight"
                match[name] = torch.empty(4, 2048, device="meta")
    given = {name: torch.zeros(1) for name in markers}
    config = comfy.model_detection.model_config_from_diffusers_unet(match)
    config.custom_operations = comfy.ops.manual_cast
    model = config.get_model(given, "", device=torch.device("meta"))
    tensors = dict(model.diffusion_model.state_dict())
    metadata, extra = told(model, tensors, {})
    assert set(extra) == set(markers)
    again = comfy.model_detection.model_config_from_unet({**tensors, **extra}, "", metadata=metadata)
    assert again.model_type({**tensors, **extra}, "") == model.model_type
    assert again.sampling_settings == config.sampling_settings


def test_a_model_that_its_weights_do_not_tell_is_refused(host):
    import types

    import comfy.supported_models

    from lowbit.host.weights.told import told

    patcher = without_a_file(host)
    other = comfy.supported_models.WAN22_S2V(dict(patcher.model.model_config.unet_config))
    model = types.SimpleNamespace(model_config=other, model_type=patcher.model.model_type)
    with pytest.raises(CheckpointError, match="would not build this model"):
        told(model, dict(patcher.model.diffusion_model.state_dict()), {})
