"""Patches on quantized weights: LoRAs beside them, hooks and merges that core's own modules fail at."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CapabilityError
from lowbit.ops.formats import FORMATS
from lowbit.ops.quantize import quantize_to_tensor, quantize_weight
from testing import tiny

BLOCK = "diffusion_model.blocks.0."
KEY = BLOCK + "self_attn.q.weight"
FUSED = BLOCK + "ffn.0.weight"


def load(host, weight_format: str = "int8", name: str = "wan_t2v.safetensors"):
    planned = host.preparing.plan_diffusion_model(host.folder / name, host.preparing.Request(weight_format))
    return host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))


def adapter(rows: int = 256, columns: int = 256, rank: int = 4, seed: int = 0, size: float = 0.02, **parts):
    """Core's LoRA of `rank`: its product's elements have a deviation of about `size`."""
    from comfy.weight_adapter.lora import LoRAAdapter

    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=generator) * size
    down = torch.randn(rank, columns, generator=generator) / rank**0.5
    values = (up, down, parts.get("alpha"), parts.get("mid"), parts.get("dora_scale"), parts.get("reshape"))
    return LoRAAdapter(set(), values)


def product(lora) -> torch.Tensor:
    up, down, alpha = lora.weights[:3]
    return up @ down * (alpha / down.shape[0] if alpha is not None else 1.0)


def with_patches(patcher, *patches, strength: float = 1.0):
    patched = patcher.clone()
    for patch in patches:
        patched.add_patches(patch, strength)
    return patched


def resident(patcher, key: str = KEY):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([patcher])
    return linear(patcher, key)


def streamed(patcher):
    """Loaded by the legacy patcher with room for nothing: weights are fetched for each call."""
    patcher.partially_load(patcher.load_device, 0)
    patcher.unpatch_model(patcher.offload_device)
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    return linear(patcher)


def linear(patcher, key: str = KEY):
    return patcher.model.get_submodule(key.removesuffix(".weight"))


def source_weight(host, key: str = KEY) -> torch.Tensor:
    return linear(load(host, "none"), key).weight.detach().float()


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", [resident, streamed])
@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_errs_no_more_than_if_it_had_been_merged_before_quantizing(host, name, way):
    lora = adapter()
    weight = source_weight(host)
    module = way(with_patches(load(host, name), {KEY: lora}))
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    merged = weight + product(lora)
    expected = x.double() @ merged.double().t() + module.bias.double()
    before = module.weight
    measured = error(module(x).double(), expected)
    module.side_product = None
    module.weight = torch.nn.Parameter(quantize_to_tensor(merged, FORMATS[name]), requires_grad=False)
    assert measured <= 1.1 * error(module(x).double(), expected)
    module.weight = before


@pytest.mark.parametrize("way", [resident, streamed])
def test_loras_on_one_weight_add_up_at_their_strengths_and_rows(host, way):
    plain = load(host, "int8")
    x = torch.randn(3, 7, 256)
    base = way(plain)(x)
    whole, other, part = adapter(seed=1, alpha=2.0), adapter(rank=8, seed=2), adapter(rows=64, rank=3, seed=3)
    patched = with_patches(with_patches(plain, {KEY: whole}, strength=0.5), {KEY: other}, {(KEY, (0, 32, 64)): part})
    delta = 0.5 * product(whole) + product(other)
    delta[32:96] += product(part)
    torch.testing.assert_close(way(patched)(x), base + x @ delta.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(way(plain)(x), base)


def test_the_weights_under_loras_are_not_touched_and_not_kept_twice(host):
    plain = load(host, "fp4_scaled")
    weights = {name: module.weight for name, module in host.patching.quantized_linears(plain.model).items()}
    patched = with_patches(plain, {f"{name}.weight": adapter(*weight.shape) for name, weight in weights.items()})
    resident(patched)
    assert not patched.backup
    assert len(patched.patches) == len(weights)
    for name, module in host.patching.quantized_linears(plain.model).items():
        assert module.weight._qdata.data_ptr() == weights[name]._qdata.data_ptr()
    size = sum(side.resident_nbytes for _, side in patched._side_products())
    assert 0 < size == patched.loaded_size() - plain.model_size()
    patched.unpatch_model(patched.offload_device)
    assert not patched._side_products()


def _difference():
    return {KEY: ("diff", (torch.full((256, 256), 0.1),))}


def _scaling_the_weight(patcher):
    patcher.add_patches({KEY: adapter()}, 1.0, 0.5)


@pytest.mark.parametrize(
    "patch",
    [
        "dora",
        "difference",
        "lora_and_difference",
        "scaled_weight",
        "columns",
    ],
)
def test_what_is_no_low_rank_update_is_cores_to_apply(host, patch):
    patcher = load(host, "int8").clone()
    weight = linear(patcher).weight.dequantize().float()
    if patch == "dora":
        patcher.add_patches({KEY: adapter(dora_scale=torch.full((256, 1), 3.0))})
        patched = weight + product(adapter())
        expected = patched * 3.0 / weight.norm(dim=1, keepdim=True)
    elif patch == "difference":
        patcher.add_patches(_difference())
        expected = weight + 0.1
    elif patch == "lora_and_difference":
        patcher.add_patches({KEY: adapter()})
        patcher.add_patches(_difference())
        expected = weight + product(adapter()) + 0.1
    elif patch == "scaled_weight":
        patcher.add_patches({KEY: adapter()}, 1.0, 0.5)
        expected = 0.5 * weight + product(adapter())
    else:
        patcher.add_patches({(KEY, (1, 0, 64)): adapter(columns=64)})
        expected = weight.clone()
        expected[:, :64] += product(adapter(columns=64))
    module = resident(patcher)
    assert module.side_product is None
    assert KEY in patcher.backup
    assert error(module.weight.dequantize().float(), expected) < 0.02


@pytest.mark.parametrize("way", [resident, streamed])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3fn_scaled", "fp4_scaled", "int4_asym_fast"])
def test_a_saved_model_has_its_loras_in_the_weights(host, name, way, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patched = with_patches(load(host, name), {KEY: adapter()})
    before = linear(patched).weight.dequantize().float()
    way(patched)
    path = host.saving.save_diffusion_model(patched, "patched")
    saved = host.loading.load_diffusion_model(str(path))
    delta = linear(saved).weight.dequantize().float() - before
    cosine = float((delta * product(adapter())).sum() / (delta.norm() * product(adapter()).norm()))
    assert cosine > {"int8": 0.95, "fp8_e4m3fn_scaled": 0.7}.get(name, 0.2)
    assert patched._side_products()


def test_clones_patch_the_same_way(host):
    patched = with_patches(load(host, "int8"), {KEY: adapter()})
    for clone in (patched.clone(), patched.clone(disable_dynamic=True), patched.clone(force_deepcopy=True)):
        assert isinstance(clone, host.patching.QuantizedModelPatcher)
        assert list(clone.patches) == [KEY]
        x = torch.randn(4, 256)
        assert torch.equal(resident(clone)(x), resident(patched)(x))


def test_an_unquantized_model_keeps_cores_patcher(host):
    assert not isinstance(load(host, "none"), host.patching.QuantizedModelPatcher)


@pytest.mark.parametrize("other", [False, True])
def test_another_strength_moves_no_weight(host, other, monkeypatch):
    """Core would unload the model and patch it anew, as it still does where a patch is in the weights."""
    import comfy.model_management
    import comfy.model_patcher

    plain = load(host, "int8")
    base = with_patches(plain, {FUSED: ("diff", (torch.full((512, 256), 0.1),))}) if other else plain
    x = torch.randn(4, 256)
    expected = resident(plain)(x) + 0.25 * x @ product(adapter()).t()
    resident(with_patches(base, {KEY: adapter()}))
    loads = []
    load_weights = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher,
        "load",
        lambda self, *a, **k: (loads.append(self), load_weights(self, *a, **k)),
    )
    changed = with_patches(base, {KEY: adapter()}, strength=0.25)
    comfy.model_management.load_models_gpu([changed])
    torch.testing.assert_close(linear(changed)(x), expected)
    assert changed.loaded_size() == plain.model_size() + changed._side_products()[0][1].resident_nbytes
    comfy.model_management.load_models_gpu([base])
    assert linear(base).side_product is None
    assert not loads
    comfy.model_management.load_models_gpu([with_patches(base, {FUSED: ("diff", (torch.full((512, 256), 0.2),))})])
    assert loads


# Hooks: patches that sampling exchanges between the parts of one batch.


def _hooked(patcher, patch, strength: float = 1.0):
    import comfy.hooks

    hook = comfy.hooks.WeightHook()
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    patcher.add_hook_patches(hook, patch, strength)
    return group


@pytest.mark.parametrize("patch", ["lora", "difference"])
@pytest.mark.parametrize("name", FORMATS)
def test_hooks_come_and_go_as_on_a_16_bit_model(host, name, patch):
    patcher = with_patches(load(host, name), {FUSED: adapter(512)})
    before = linear(patcher).weight.dequantize().float()
    value = {KEY: adapter()} if patch == "lora" else _difference()
    delta = product(adapter()) if patch == "lora" else torch.tensor(0.1)
    group = _hooked(patcher, value, 0.5)
    module = resident(patcher)
    x = torch.randn(64, 256)
    plain = module(x)
    seen = []
    for _ in range(3):
        patcher.apply_hooks(group)
        seen.append(module(x))
        assert linear(patcher, FUSED).side_product is not None
        patcher.apply_hooks(None)
        assert torch.equal(module(x), plain)
        assert torch.equal(module.weight.dequantize().float(), before)
    expected = x @ (before + 0.5 * delta).t() + module.bias
    quantization = error(module(x), x @ before.t() + module.bias)
    # A difference is quantized with the weight, at random between two steps of its format.
    again = 0.0 if patch == "lora" else 0.3 if name.startswith(("fp4", "int4")) else 0.12
    assert error(seen[0], expected) <= quantization + again + 1e-3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    patcher.cleanup()


def _set(rows: torch.Tensor):
    return {KEY: ("set", (rows,))}


def _turned():
    from comfy.weight_adapter.oft import OFTAdapter

    blocks = torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.1
    return {KEY: OFTAdapter(set(), (blocks, None, torch.tensor(0.0), None))}


@pytest.mark.parametrize("patch", ["dora", "set", "turned", "lora_and_set"])
def test_hooks_that_need_the_weight_find_the_loras_below_them_in_it(host, patch):
    lora, scale = adapter(seed=5, size=0.1), torch.full((256, 1), 3.0)
    hooks = {
        "dora": [{KEY: adapter(dora_scale=scale)}],
        "set": [_set(torch.randn(256, 256))],
        "turned": [_turned()],
        "lora_and_set": [{KEY: adapter(seed=6)}, _set(torch.randn(256, 256))],
    }[patch]
    expected, measured = (with_patches(load(host, name), {KEY: lora}) for name in ("none", "int8"))
    outputs = []
    x = torch.randn(16, 256)
    for patcher in (expected, measured):
        group = _hooked(patcher, hooks[0])
        for other in hooks[1:]:
            group = group.clone_and_combine(_hooked(patcher, other))
        module = resident(patcher)
        plain = module(x)
        patcher.apply_hooks(group)
        patched = module(x)
        patcher.apply_hooks(None)
        assert torch.equal(module(x), plain)
        patcher.apply_hooks(group)
        outputs.append((patched, module(x)))
        patcher.cleanup()
    assert error(outputs[1][0], outputs[0][0]) < 0.02
    assert error(outputs[1][1], outputs[0][0]) < 0.02


@pytest.mark.parametrize("name", ["int8", "fp4_scaled"])
def test_hooks_reach_every_layer_that_they_reach_on_a_16_bit_model(host, name):
    """Those that are kept in 16 bits too, whose module core builds for quantized weights all the same."""
    import comfy.hooks

    patcher = load(host, name)
    resident(patcher)
    before = {key: _number(value) for key, value in patcher.model.named_parameters()}
    weights = {f"diffusion_model.{key}": value.flip(0) for key, value in tiny.wan_tensors().items()}
    hook = comfy.hooks.create_hook_model_as_lora(weights, None, 0.5, 0.0)
    for part in hook.hooks:
        patcher.add_hook_patches(part, part.weights, 0.5)
    for _ in range(3):
        patcher.apply_hooks(hook)
        for key, value in patcher.model.named_parameters():
            assert error(_number(value), before[key].lerp(weights[key].float(), 0.5)) < (
                0.2 if "4" in name else 0.02
            ), key
        patcher.apply_hooks(None)
        assert all(torch.equal(_number(value), before[key]) for key, value in patcher.model.named_parameters())
    patcher.cleanup()


def test_a_hook_made_of_a_quantized_model_is_refused(host):
    import comfy.hooks

    patcher, other = load(host, "int8"), load(host, "fp8_e4m3fn_scaled")
    hook = comfy.hooks.create_hook_model_as_lora(comfy.hooks.get_patch_weights_from_model(other), None, 0.5, 0.0)
    with pytest.raises(CapabilityError, match="16-bit checkpoint"):
        patcher.add_hook_patches(hook.hooks[0], hook.hooks[0].weights)


# Merges.


@pytest.mark.parametrize("formats", [("none", "int8"), ("int8", "none"), ("int8", "fp4_scaled"), ("mxfp8", "mxfp8")])
def test_models_merge_whichever_is_quantized(host, formats):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    first, second = (load(host, name) for name in formats)
    with torch.inference_mode():
        values = [_values(linear(patcher)) for patcher in (first, second)]
    (merged,) = ModelMergeSimple().merge(first, second, 0.25)
    module = resident(merged)
    assert error(_values(module), 0.25 * values[0] + 0.75 * values[1]) < 0.05


def _values(module) -> torch.Tensor:
    return _number(module.weight)


def _number(weight: torch.Tensor) -> torch.Tensor:
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight).detach().float().clone()


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_that_core_lists_can_be_looked_up(host, name):
    patcher = load(host, name)
    found = patcher.get_key_patches()
    assert set(found) == set(patcher.model_state_dict())
    for key, tensor in patcher.model_state_dict().items():
        if not key.endswith(".weight"):
            assert torch.equal(found[key][0][0].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", ["STANDARD", "FULL_DIFF"])
@pytest.mark.parametrize("name", ["int8_convrot_fast", "fp8_e4m3fn_scaled"])
def test_a_lora_is_extracted_from_numbers_and_not_from_codes(host, name, kind):
    from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model

    lora, attention = adapter(size=0.5), f"{BLOCK}self_attn."
    difference = with_patches(load(host, name), {KEY: lora})
    for key, patches in load(host, name).get_key_patches(attention).items():
        difference.add_patches({key: patches}, -1.0, 1.0)
    made = {
        key: value.float() for key, value in calc_lora_model(difference, 4, attention, "", {}, LORAType[kind]).items()
    }
    update = made["q.diff"] if kind == "FULL_DIFF" else made["q.lora_up.weight"] @ made["q.lora_down.weight"]
    # Core clamps the factors' outliers.
    assert error(update, product(lora)) < 0.2


@pytest.mark.parametrize("formats", [("none", "int8"), ("int8", "none"), ("fp8_e4m3fn_scaled", "fp4_scaled")])
def test_text_encoders_merge_whichever_is_quantized(host, umt5, formats):
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    first, second = (umt5(name) for name in formats)
    name = next(
        key.removesuffix(".comfy_quant")
        for clip in (first, second)
        for key in clip.cond_stage_model.state_dict()
        if key.endswith("wi_0.comfy_quant")
    )
    values = [_values(clip.cond_stage_model.get_submodule(name)) for clip in (first, second)]
    assert all(key in second.patcher.get_key_patches() for key in second.patcher.model_state_dict())
    (merged,) = CLIPMergeSimple().merge(first, second, 0.25)
    resident(merged.patcher, f"{name}.weight")
    assert error(_values(merged.cond_stage_model.get_submodule(name)), 0.25 * values[0] + 0.75 * values[1]) < 0.06


# Tables of embeddings that a file holds quantized.

TABLE = "umt5xxl.transformer.shared.weight"


@pytest.fixture(params=["float8_e4m3fn", "int8", "int8_convrot"])
def encoder_with_table(host, umt5, tmp_path, request):
    """The tiny UMT5 of a file in which the table, and nothing else, is quantized."""
    import comfy.sd

    tensors = tiny.umt5_tensors()
    parts = quantize_weight(tensors.pop("shared.weight"), request.param)
    path = tmp_path / "table.safetensors"
    save_file(tensors | {f"shared.{suffix}": part for suffix, part in parts.items()}, path)
    umt5("none")
    clip = host.loading.load_text_encoder([str(path)], comfy.sd.CLIPType.WAN)
    assert hasattr(linear(clip.patcher, TABLE).weight, "dequantize")
    return clip


@pytest.mark.parametrize("hooked", [False, True])
def test_a_patch_on_a_quantized_table_is_in_it_while_it_lasts(encoder_with_table, hooked):
    patcher = encoder_with_table.patcher.clone()
    table = resident(patcher, TABLE)
    before = _values(table)
    delta = torch.randn(before.shape) * 0.3
    group = (
        _hooked(patcher, {TABLE: ("diff", (delta,))}) if hooked else patcher.add_patches({TABLE: ("diff", (delta,))})
    )
    for _ in range(2):
        resident(patcher, TABLE)
        if hooked:
            patcher.apply_hooks(group)
        assert error(_values(table), before + delta) < 0.06
        if hooked:
            patcher.apply_hooks(None)
        else:
            patcher.unpatch_model(patcher.offload_device)
        assert torch.equal(_values(table), before)


def test_text_encoders_merge_where_either_has_a_quantized_table(encoder_with_table, umt5):
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    plain = umt5("none")
    plain.add_patches({TABLE: ("diff", (torch.ones(_values(linear(plain.patcher, TABLE)).shape),))})
    values = [_values(linear(clip.patcher, TABLE)) for clip in (encoder_with_table, plain)]
    expected = 0.25 * values[0] + 0.75 * (values[1] + 1)
    for first, second, ratio in ((encoder_with_table, plain, 0.25), (plain, encoder_with_table, 0.75)):
        (merged,) = CLIPMergeSimple().merge(first, second, ratio)
        assert error(_values(resident(merged.patcher, TABLE)), expected) < 0.06


def test_a_lora_on_a_text_encoder_stands_beside_its_weights(host, umt5):
    clip = umt5("int8")
    name, module = next(iter(host.patching.quantized_linears(clip.patcher.model).items()))
    before = clip.encode_from_tokens(clip.tokenize("a red train"))
    patched = clip.clone()
    patched.add_patches({f"{name}.weight": adapter(*module.weight.shape, size=0.5)})
    assert not torch.equal(patched.encode_from_tokens(patched.tokenize("a red train")), before)
    assert module.side_product is not None
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a red train")), before)


def test_a_linear_with_a_lora_compiles_whole(host):
    module = resident(with_patches(load(host, "int8_convrot_fast"), {KEY: adapter()}))
    x = torch.randn(7, 256)
    torch._dynamo.reset()
    compiled = torch.compile(module.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_an_activation_on_the_way_comes_before_the_lora(host):
    down = BLOCK + "ffn.2.weight"
    module = resident(with_patches(load(host, "int8"), {down: adapter(256, 512)}), down)
    hidden = torch.randn(7, 512)
    activated = torch.nn.functional.gelu(hidden, approximate="tanh")
    torch.testing.assert_close(module(hidden, activation="gelu_tanh"), module(activated))
