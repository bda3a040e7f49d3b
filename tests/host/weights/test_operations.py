"""The quantized linear inside core's modules: one multiply, no scale made again, core's own way wherever core must see it."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.ops.formats import FORMATS
from lowbit.ops.linear import quantized_linear

from .files import block, load


@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_of_the_model_is_our_multiply_in_every_format(host, name):
    linear = block(load(host, name)).self_attn.q
    assert isinstance(linear, host.operations.QuantizedLinear)
    assert linear.fast is FORMATS[name].fast
    x = torch.randn(3, 5, 256)
    expected = quantized_linear(x, linear.weight, linear.bias, fast=FORMATS[name].fast)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_no_scale_is_made_or_changed_in_forward(host, name, monkeypatch):
    patcher = load(host, name)
    linear = block(patcher).ffn[2]
    weight = linear.weight
    tensors = [weight._qdata, *(value for value in vars(weight._params).values() if isinstance(value, torch.Tensor))]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    for layout in {weight.layout_cls, *weight.layout_cls.__mro__[1:2]}:
        monkeypatch.setattr(layout, "quantize", lambda *a, **k: pytest.fail("a weight was quantized in forward"))
    for _ in range(3):
        linear(torch.randn(4, 512))
    assert linear.weight is weight
    for tensor, (pointer, copy) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), copy.reshape(-1).view(torch.uint8))


def test_a_weight_function_is_cores_and_only_while_it_is_there(host):
    linear = block(load(host, "int8_convrot_fast")).self_attn.k
    x = torch.randn(4, 256)
    ours = linear(x)
    linear.weight_function = [lambda weight: weight * 2]
    patched = linear(x)
    linear.weight_function = []
    assert torch.equal(linear(x), ours)
    expected = torch.nn.functional.linear(x, linear.weight.dequantize().to(x.dtype) * 2, linear.bias)
    assert torch.allclose(patched, expected, rtol=1e-3, atol=1e-4)


def test_the_linears_that_read_one_tensor_are_one_group(host):
    attention = block(load(host, "int8")).self_attn
    assert [getattr(attention, name).input_group for name in ("q", "k", "v", "o")] == [
        "first of q",
        "q",
        "q",
        "",
    ]
    module, alone = torch.nn.Module(), torch.nn.Module()
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "to_add_out"):
        module.add_module(name, host.operations.QuantizedLinear())
    alone.add_module("to_q", host.operations.QuantizedLinear())
    assert host.input_groups.group_inputs(torch.nn.ModuleList([module, alone])) == 5
    assert (module.to_k.input_group, module.add_q_proj.input_group, module.to_add_out.input_group) == (
        "to_q",
        "first of add_q_proj",
        "",
    )
    assert alone.to_q.input_group == ""


def test_a_linear_around_which_somebody_stands_shares_its_input_with_none(host, monkeypatch):
    """A hook or another forward may change the input in place, which nothing counts in inference mode."""
    attention, x, groups = block(load(host, "int8")).self_attn, torch.randn(4, 256), []
    plain = host.operations.quantized_linear
    monkeypatch.setattr(
        host.operations,
        "quantized_linear",
        lambda *args, input_group, **options: (
            groups.append(input_group) or plain(*args, input_group=input_group, **options)
        ),
    )

    def called(linear):
        linear(x)
        return groups.pop()

    assert [called(attention.q), called(attention.k), called(attention.v)] == ["first of q", "q", "q"]
    hook = attention.k.register_forward_pre_hook(lambda module, args: None)
    assert called(attention.k) == ""
    hook.remove()
    hook = attention.k.register_forward_hook(lambda module, args, out: None)
    assert called(attention.k) == ""
    hook.remove()
    attention.k.forward = attention.k.forward
    assert called(attention.k) == ""
    del attention.k.forward
    assert called(attention.k) == "q"


def test_adopting_twice_changes_nothing(host):
    patcher = load(host, "int8")
    classes = [type(module) for module in patcher.model.modules()]
    count = host.loading.take_over(patcher.model)
    assert [type(module) for module in patcher.model.modules()] == classes
    assert count == sum(issubclass(kind, host.operations.QuantizedLinear) for kind in classes) > 0


def test_an_unquantized_model_is_left_to_core(host):
    patcher = load(host, "none")
    assert not any(isinstance(module, host.operations.QuantizedLinear) for module in patcher.model.modules())
    assert host.loading.take_over(patcher.model) == 0
    assert type(block(patcher).ffn).__name__ == "WanFeedForward"


@pytest.mark.parametrize("name", ["int8_convrot_fast", "fp8_e4m3fn_scaled", "fp4_scaled"])
def test_the_fused_feed_forward_is_the_plain_one(host, monkeypatch, name):
    feed_forward, activations = block(load(host, name)).ffn, []
    plain = host.operations.quantized_linear

    def multiply(*args, activation, **options):
        activations.append(activation)
        return plain(*args, activation=activation, **options)

    x = torch.randn(7, 256)
    hidden = torch.nn.functional.gelu(feed_forward[0](x), approximate="tanh")
    expected = feed_forward[2](hidden)
    monkeypatch.setattr(host.operations, "quantized_linear", multiply)
    assert torch.allclose(feed_forward(x), expected, rtol=1e-3, atol=1e-3)
    assert activations == [None, "gelu_tanh"]


def test_clones_for_other_gpus_are_loaded_the_same_way(host):
    patcher = load(host, "fp4_scaled")
    factory, arguments = patcher.cached_patcher_init
    clone = factory(*arguments, disable_dynamic=True)
    assert isinstance(block(clone).self_attn.q, host.operations.QuantizedLinear)


@pytest.mark.parametrize("tensors", [{"x": torch.zeros(4)}, {"lora_unet_a.lora_up.weight": torch.zeros(4, 4)}])
def test_a_file_of_no_known_architecture_is_said_by_name(host, tmp_path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors is no diffusion model"):
        host.loading.load_diffusion_model(str(tmp_path / "odd.safetensors"))


def _bypass(linear, strength: float = 1.0):
    """Core's LoRA by bypass on one linear: output + up(down(input)), the input being what forward was called with."""
    from comfy.weight_adapter.bypass import BypassForwardHook
    from comfy.weight_adapter.lora import LoRAAdapter

    rows, columns = linear.weight.shape
    up, down = torch.randn(rows, 4) * 0.3, torch.randn(4, columns) * 0.3
    hook = BypassForwardHook(linear, LoRAAdapter(set(), (up, down, 4.0, None, None, None)), strength)
    hook.inject()
    return hook, lambda x: x @ down.t() @ up.t()


@pytest.mark.parametrize("name", ["int8_convrot_fast", "fp8_e4m3fn_scaled"])
def test_a_lora_by_bypass_meets_what_comes_after_the_activation(host, name):
    feed_forward = block(load(host, name)).ffn
    x = torch.randn(7, 256)
    plain = feed_forward(x)
    hook, delta = _bypass(feed_forward[2])
    hidden = torch.nn.functional.gelu(feed_forward[0](x), approximate="tanh")
    assert torch.allclose(feed_forward(x), plain + delta(hidden), rtol=1e-3, atol=1e-2)
    hook.eject()
    assert torch.equal(feed_forward(x), plain)


@pytest.mark.parametrize("tied", ["hook", "pre-hook", "bypass LoRA"])
def test_what_stands_around_a_linear_is_done_once_in_a_compiled_graph(host, tied):
    linear = block(load(host, "int8")).self_attn.q
    if tied == "bypass LoRA":
        undo = _bypass(linear)[0].eject
    elif tied == "hook":
        undo = linear.register_forward_hook(lambda module, args, out: out * 2).remove
    else:
        undo = linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,)).remove
    x = torch.randn(4, 256)
    expected = linear(x)
    torch._dynamo.reset()
    out = torch.compile(lambda x: linear(x), backend="aot_eager")(x)
    undo()
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_a_down_projection_see_what_comes_after_the_activation(host):
    feed_forward = block(load(host, "int8")).ffn
    x, seen = torch.randn(7, 256), []
    handle = feed_forward[2].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    feed_forward(x)
    handle.remove()
    assert torch.equal(seen[0], torch.nn.functional.gelu(feed_forward[0](x), approximate="tanh"))


def test_cores_way_to_join_activation_and_linear_knows_a_lora_by_bypass(host):
    import comfy.ops

    linear = block(load(host, "int8_convrot_fast")).ffn[2]
    hidden = torch.randn(7, 512)
    activated = torch.nn.functional.gelu(hidden, approximate="tanh")
    hook, delta = _bypass(linear)
    expected = hook.original_forward(activated) + delta(activated)
    assert torch.allclose(comfy.ops.linear_input_act(linear, hidden, "gelu_tanh"), expected, rtol=1e-3, atol=1e-2)
    hook.eject()


def test_the_fused_feed_forward_compiles_whole(host):
    feed_forward = block(load(host, "int8_convrot_fast")).ffn
    x = torch.randn(7, 256)
    torch._dynamo.reset()
    compiled = torch.compile(feed_forward.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), feed_forward(x))
