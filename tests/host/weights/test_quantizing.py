"""Quantizing a model behind another loader: its patches stay, its weights are those of its file or its own."""

from __future__ import annotations

import gc

import pytest
import torch

from lowbit.errors import CapabilityError, CheckpointError
from testing.measure import relative_error

from .files import block, load

KEY = "diffusion_model.blocks.0.self_attn.q.weight"


def without_a_file(host):
    patcher = load(host, "none")
    patcher.cached_patcher_init = None
    return patcher


def quantize(host, patcher, weight_format: str = "int8", **options):
    planned = host.quantizing.plan_model(patcher, host.preparing.Request(weight_format, **options))
    return host.quantizing.quantize_model(patcher, planned), planned


def temporary(host) -> set[str]:
    cache = host.folders.cache_folder()
    return {path.relative_to(cache).as_posix() for path in cache.rglob("temporary-*/*.safetensors")}


def test_quantizing_a_loaded_model_keeps_its_patches_and_leaves_the_original_alone(host):
    original = load(host, "none")
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
    first, planned = quantize(host, without_a_file(host), "fp8_e4m3fn_scaled", keep_quantized_file=True)
    made = temporary(host)
    again, _ = quantize(host, without_a_file(host), "fp8_e4m3fn_scaled", keep_quantized_file=True)
    assert temporary(host) == made
    assert first.cached_patcher_init == again.cached_patcher_init
    assert set(host.folders.cache_folder().glob("*.safetensors")) == cached
    assert not planned.request.keep_quantized_file


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


def from_core(host, name: str, weight_format: str = "none"):
    """Core's own model of a file, as another pack's loader makes it: no file is noted."""
    import comfy.sd
    import comfy.utils

    planned = host.preparing.plan_diffusion_model(host.folder / name, host.preparing.Request(weight_format))
    state_dict, metadata = comfy.utils.load_torch_file(str(host.preparing.prepared_file(planned)), return_metadata=True)
    return comfy.sd.load_diffusion_model_state_dict(state_dict, metadata=metadata)


@pytest.mark.parametrize(("stored", "asked"), [("int8", "auto"), ("int8", "none"), ("none", "none")])
@pytest.mark.parametrize("noted", [False, True])
def test_a_model_with_nothing_to_quantize_stays_as_it_is(host, stored, noted, asked):
    patcher = from_core(host, "wan_t2v.safetensors", stored)
    if noted:
        patcher.cached_patcher_init = load(host, stored).cached_patcher_init
    classes = [type(module) for module in patcher.model.modules()]
    quantized, _ = quantize(host, patcher, asked)
    assert [type(module) for module in patcher.model.modules()] == classes
    multiplies_here = isinstance(block(quantized).self_attn.q, host.operations.QuantizedLinear)
    assert multiplies_here is (noted and stored != "none")


# What else a clone carries.


def values(patcher, x=None):
    """What the block of the model that runs makes of an input, as core runs it: patches and injections in place."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 16, 3, 8, 8, generator=generator)
    context = torch.randn(1, 8, patcher.model.diffusion_model.text_embedding[0].weight.shape[1], generator=generator)
    return patcher.model.apply_model(
        x, torch.tensor([0.5]), c_crossattn=context, transformer_options=patcher.model_options["transformer_options"]
    )


def bypass_lora(patcher, strength: float = 1.0):
    from comfy.weight_adapter.bypass import BypassInjectionManager
    from comfy.weight_adapter.lora import LoRAAdapter

    generator = torch.Generator().manual_seed(4)
    manager = BypassInjectionManager()
    for layer in ("ffn.0", "ffn.2"):
        rows, columns = patcher.model.get_submodule(f"diffusion_model.blocks.0.{layer}").weight.shape
        factors = (torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator) * 0.2)
        manager.add_adapter(
            f"diffusion_model.blocks.0.{layer}.weight", LoRAAdapter(set(), (*factors, None, None, None, None)), strength
        )
    patched = patcher.clone()
    patched.set_injections("bypass_lora", manager.create_injections(patched.model))
    return patched


def compiled_by_core(patcher):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = patcher.clone()
    set_torch_compile_wrapper(patched, backend="eager")
    return patched


def compiled_block(patcher):
    """As KJNodes does it."""
    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.blocks.0", torch.compile(block(patched), backend="eager"))
    return patched


def _doubling(self, x, *args, **kwargs):
    return 2 * type(self).forward(self, x, *args, **kwargs)


def replaced_method(patcher):
    patched = patcher.clone()
    layer = block(patched).ffn
    patched.add_object_patch("diffusion_model.blocks.0.ffn.forward", _doubling.__get__(layer))
    return patched


def replaced_function(patcher):
    """A closure over the layer and its method, in a container of an object's."""

    class Holder:
        def __init__(self, layer):
            self.layers = {"one": (layer, layer.forward)}

    holder = Holder(block(patcher).ffn)

    def forward(x, *args, **kwargs):
        layer, own = holder.layers["one"]
        return own(x) + type(layer).forward(layer, x)

    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.blocks.0.ffn.forward", forward)
    return patched


def replaced_module(patcher):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *args, **kwargs):
            return 2 * self.inner(x, *args, **kwargs)

    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.blocks.0.ffn", Doubled(block(patched).ffn))
    return patched


@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_node_put_in_place_of_the_sampling_stays(host, loaded):
    """A run without the quantizing node before one with it leaves the other clone's patches in place."""
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    plain = load(host, "none")
    own = plain.model.model_sampling
    sampling = type("ModelSamplingAdvanced", (ModelSamplingDiscreteFlow, CONST), {})(plain.model.model_config)
    sampling.set_parameters(shift=5.0)
    shifted = plain.clone()
    shifted.add_object_patch("model_sampling", sampling)
    if loaded:
        values(shifted)
    quantized, _ = quantize(host, shifted, "int8")
    assert quantized.get_model_object("model_sampling") is sampling
    values(quantized)
    assert quantized.model.model_sampling is sampling
    assert (plain.model.model_sampling is own) is not loaded
    values(plain)
    assert plain.model.model_sampling is own


@pytest.mark.parametrize(
    "node",
    [bypass_lora, compiled_by_core, compiled_block, replaced_method, replaced_function, replaced_module],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_node_tied_to_the_layers_is_tied_to_the_quantized_ones(host, node, loaded, monkeypatch):
    import comfy.model_management

    torch._dynamo.reset()
    plain = load(host, "none")
    original = node(plain)
    if loaded:
        values(original)
    quantized, _ = quantize(host, original, "int8")
    ran = []
    # A copy of what another node put in shares its hooks.
    layers = [module for module in plain.model.diffusion_model.blocks.modules() if type(module).__name__ != "Doubled"]
    for module in layers:
        module.register_forward_hook(lambda *a: ran.append(a[0]))
    torch._dynamo.reset()
    value = values(quantized)
    assert not ran
    comfy.model_management.unload_all_models()
    # What is compiled gives what it gives uncompiled.
    reference = load(host, "none") if "compiled" in node.__name__ else node(load(host, "none"))
    assert relative_error(value, values(reference)) < 0.02
    if "compiled" not in node.__name__:
        comfy.model_management.unload_all_models()
        assert relative_error(values(load(host, "none")), value) > 0.05


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_layers_that_a_node_changed_themselves_are_named(host, change):
    patcher = load(host, "none")
    layer = block(patcher).self_attn.q
    if change == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output * 2)
    else:
        layer.forward = lambda x: x
    with pytest.raises(CapabilityError, match=r"'blocks\.0\.self_attn\.q'.* behind Quantize Model"):
        quantize(host, patcher)


def test_what_has_no_counterpart_is_named(host):
    patcher = load(host, "none")
    patched = patcher.clone()
    extra = torch.nn.Linear(4, 4)
    block(patched).extra = extra
    patched.add_object_patch("diffusion_model.blocks.0.ffn.forward", lambda x: extra(x))
    with pytest.raises(CapabilityError, match=r"object_patches: diffusion_model\.blocks\.0\.ffn\.forward"):
        quantize(host, patched)


def test_what_is_tied_to_nothing_stays_the_same_object(host):
    patched = load(host, "none").clone()
    mark = object()
    patched.model_options["transformer_options"]["mark"] = mark
    patched.add_object_patch("diffusion_model.blocks.0.mark", mark)
    patched.attachments["function"] = function = lambda: mark
    quantized, _ = quantize(host, patched)
    assert quantized.model_options["transformer_options"]["mark"] is mark
    assert quantized.object_patches["diffusion_model.blocks.0.mark"] is mark
    assert quantized.attachments["function"] is function


# Weights that are not the file's any more.


@pytest.mark.parametrize("edit", [lambda w: w.mul_(1.1), lambda w: w[-1].add_(1.0), lambda w: w[0, 0].add_(0.1)])
def test_weights_edited_in_place_are_quantized_as_they_are(host, edit, caplog):
    patcher = load(host, "none")
    edit(block(patcher).self_attn.q.weight)
    edited = block(patcher).self_attn.q.weight.clone()
    quantized, planned = quantize(host, patcher, "int8")
    assert relative_error(block(quantized).self_attn.q.weight.dequantize(), edited) < 0.02
    assert not planned.request.keep_quantized_file
    assert "'blocks.0.self_attn.q.weight' among them" in caplog.text


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn, torch.bfloat16])
def test_weights_that_core_cast_on_loading_are_the_files(host, dtype):
    import comfy.sd

    path = host.folder / "wan_t2v.safetensors"
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})
    assert host.quantizing.edited_weights(patcher, host.preparing.open_checkpoint(path)) == []
    _, planned = quantize(host, patcher)
    assert planned.checkpoint.path == path


# Temporary files.


def test_a_temporary_file_goes_with_the_last_model_of_it(host):
    gc.collect()
    before = temporary(host)
    first, _ = quantize(host, without_a_file(host), "fp8_e5m2")
    again, _ = quantize(host, without_a_file(host), "fp8_e5m2")
    (path,) = temporary(host) - before
    del first
    gc.collect()
    assert path in temporary(host)
    clone = again.clone()
    del again
    gc.collect()
    assert path in temporary(host)
    factory, arguments = clone.cached_patcher_init
    factory(*arguments, disable_dynamic=True)
    del clone
    gc.collect()
    assert temporary(host) == before


def test_a_turn_of_a_slider_leaves_one_file(host):
    gc.collect()
    before = temporary(host)
    quantized = None
    for turn in range(4):
        source = without_a_file(host)
        block(source).self_attn.q.weight.mul_(1 + turn / 10)
        quantized, _ = quantize(host, source, "fp8_e5m2")
        del source
    assert quantized is not None
    gc.collect()
    assert len(temporary(host) - before) == 1
