"""Quantizing a model behind another loader: its patches stay, its weights are those of its file or its own."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.errors import CheckpointError

KEY = "diffusion_model.blocks.0.self_attn.q.weight"


def load(host, weight_format: str = "none", name: str = "wan_t2v.safetensors"):
    planned = host.preparing.plan_file(host.folder / name, host.preparing.Request(weight_format))
    return host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))


def without_a_file(host):
    patcher = load(host)
    patcher.cached_patcher_init = None
    return patcher


def quantize(host, patcher, weight_format: str = "int8", **options):
    planned = host.quantizing.plan_model(patcher, host.preparing.Request(weight_format, **options))
    return host.quantizing.quantize_model(patcher, planned), planned


def block(patcher):
    return patcher.model.diffusion_model.blocks[0]


def temporary(host) -> set[str]:
    cache = host.folders.cache_folder()
    return {path.relative_to(cache).as_posix() for path in cache.rglob("temporary-*/*.safetensors")}


def test_quantizing_a_loaded_model_keeps_its_patches_and_leaves_the_original_alone(host):
    original = load(host)
    original.add_patches({KEY: ("diff", (torch.ones(256, 256),))})
    original.model_options["transformer_options"]["mark"] = 1
    quantized, planned = quantize(host, original)
    assert list(quantized.patches) == [KEY]
    assert quantized.model_options["transformer_options"]["mark"] == 1
    assert isinstance(block(quantized).self_attn.q, host.operations.QuantizedLinear)
    assert not isinstance(block(original).self_attn.q, host.operations.QuantizedLinear)
    assert quantized.model_size() < 0.8 * original.model_size()
    assert planned.plan.changes_weights


def test_a_model_without_a_file_is_quantized_from_its_weights(host):
    from_weights, _ = quantize(host, without_a_file(host))
    from_file = load(host, "int8")
    assert torch.equal(block(from_weights).ffn[0].weight._qdata, block(from_file).ffn[0].weight._qdata)


def test_the_weights_are_those_under_the_patches(host):
    import comfy.model_management

    patcher = without_a_file(host)
    patcher.add_patches({KEY: ("diff", (torch.ones(256, 256),))})
    comfy.model_management.load_models_gpu([patcher])
    assert KEY in patcher.backup
    quantized, _ = quantize(host, patcher)
    assert torch.equal(block(quantized).self_attn.q.weight._qdata, block(load(host, "int8")).self_attn.q.weight._qdata)


def test_what_is_made_of_a_model_without_a_file_is_not_kept_and_is_made_once(host):
    cached = set(host.folders.cache_folder().glob("*.safetensors"))
    first, planned = quantize(host, without_a_file(host), "fp8_e4m3fn_scaled", keep_file=True)
    made = temporary(host)
    again, _ = quantize(host, without_a_file(host), "fp8_e4m3fn_scaled", keep_file=True)
    assert temporary(host) == made
    assert first.cached_patcher_init == again.cached_patcher_init
    assert set(host.folders.cache_folder().glob("*.safetensors")) == cached
    assert not planned.request.keep_file


def test_two_models_of_one_shape_do_not_take_each_others_file(host):
    """As the two experts of Wan 2.2 would, loaded by another pack."""
    first, _ = quantize(host, without_a_file(host), "fp4_scaled")
    other = without_a_file(host)
    with torch.inference_mode():
        block(other).ffn[0].weight.neg_()
    second, _ = quantize(host, other, "fp4_scaled")
    for patcher in (first, second):
        factory, arguments = patcher.cached_patcher_init
        factory(*arguments, disable_dynamic=True)
    assert first.cached_patcher_init != second.cached_patcher_init


def test_a_plan_alone_writes_nothing(host):
    before = set(host.folders.cache_folder().rglob("*"))
    planned = host.quantizing.plan_model(without_a_file(host), host.preparing.Request("int4_asym_fast"))
    assert "blocks.*.self_attn.q (2 layers)  256x256  quantized int4_asym" in planned.report
    assert set(host.folders.cache_folder().rglob("*")) == before


def test_placeholders_without_values_are_refused_in_a_sentence(host):
    patcher = without_a_file(host)
    q = block(patcher).self_attn.q
    q.weight = torch.nn.Parameter(q.weight.to("meta"), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.self_attn\.q\.weight' has no values .* GGUF"):
        host.quantizing.plan_model(patcher, host.preparing.Request("int8"))


def test_a_model_that_is_quantized_already_is_only_taken_over(host):
    import comfy.sd
    import comfy.utils

    source = host.preparing.prepared_file(
        host.preparing.plan_file(host.folder / "wan_t2v.safetensors", host.preparing.Request("int8"))
    )
    state_dict, metadata = comfy.utils.load_torch_file(str(source), return_metadata=True)
    patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, metadata=metadata)
    assert not isinstance(block(patcher).self_attn.q, host.operations.QuantizedLinear)
    quantized, _ = quantize(host, patcher, "auto")
    assert isinstance(block(quantized).self_attn.q, host.operations.QuantizedLinear)


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
