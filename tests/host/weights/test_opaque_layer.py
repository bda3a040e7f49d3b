"""Models compiled as core's TorchCompileModel compiles them: one graph, compiled anew for another length of text only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowbit.attention.candidates import Policy
from lowbit.attention.schedule import Schedule
from testing.measure import relative_error

from .files import load
from .test_patching import BLOCK, adapter, with_patches

# torch's own compiler says it of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")

CASES = {
    "wan_t2v.safetensors": ((1, 16, 3, 8, 8), 256, BLOCK + "self_attn.q.weight"),
    "qwen_image.safetensors": ((1, 16, 1, 8, 8), 64, "diffusion_model.transformer_blocks.1.attn.to_k.weight"),
}  # fmt: skip
"""File -> shape of the latent, width of the text, a weight for a LoRA."""


@pytest.fixture(autouse=True)
def fresh(host, monkeypatch):
    """Core takes the tiny Qwen-Image's width off its tensors; no graph is from another test."""
    import comfy.model_detection

    from testing.shims import detection

    wrapped = detection._with_qwen_image_dims(comfy.model_detection.detect_unet_config)
    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", wrapped)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sample(patcher, name: str, tokens: int, steps: int = 3) -> torch.Tensor:
    import comfy.sample

    latent, width, *_ = CASES[name]
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.randn(latent, generator=generator)
    texts = [[[torch.randn(1, tokens, width, generator=generator), {}]] for _ in range(2)]
    empty = torch.zeros(latent)
    return comfy.sample.sample(
        patcher, noise, steps, 2.0, "euler", "simple", *texts, empty, seed=1, disable_pbar=True
    )  # fmt: skip


def compiled(patcher):
    """The clone that core's node makes."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


class Compilations:
    """Graphs compiled since it was made; any break in one is an error."""

    def __init__(self):
        torch._dynamo.utils.counters.clear()

    @property
    def count(self) -> int:
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"], counters["graph_break"]
        return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_one_graph_whatever_its_prompt_step_and_lora(host, name, tmp_path):
    from lowbit.host.attention.installing import install_override

    loaded = load(host, "int8", name)
    plain, _ = install_override(loaded, Policy("auto", "exact"), Schedule(), False, tmp_path)
    model, compilations = compiled(plain), Compilations()
    for tokens, graphs in ((7, 1), (9, 2), (12, 2)):
        assert relative_error(sample(model, name, tokens), sample(plain, name, tokens)) < 1e-3
        assert compilations.count == graphs
    key = CASES[name][2]
    lora = {key: adapter(*plain.get_model_object(key).shape, size=0.3)}
    without = sample(plain, name, 9)
    for strength in (1.0, 0.5):
        got, want = (sample(with_patches(one, lora, strength=strength), name, 9) for one in (model, plain))
        assert relative_error(got, want) < 1e-3 < relative_error(want, without)
    assert compilations.count == 2


def test_modules_compiled_one_by_one_have_a_graph_for_each_part_in_a_group(host):
    blocks = load(host, "int8").model.diffusion_model.blocks
    linears = [getattr(block.self_attn, name) for block in blocks for name in ("q", "k", "v", "o")]
    x, compilations = torch.randn(1, 8, 256), Compilations()
    for linear in linears:
        run = torch.compile(linear, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(x), linear(x))
    assert compilations.count == 4, "the very first, and then the first, a later one and one outside of any"


def test_a_copied_module_is_another_one_to_a_graph(host):
    module = host.operations.QuantizedLinear()
    module.handle = host.opaque_layer.OpaqueHandle(module)
    copied = copy.deepcopy(module)
    numbers = [each.handle.sized.shape[0] for each in (module, copied)]
    assert [host.opaque_layer._LAYERS[number] for number in numbers] == [module, copied]
    del copied
    assert numbers[1] not in host.opaque_layer._LAYERS


def test_the_operator_tells_the_compiler_what_it_gives(host):
    linear = load(host, "int8_convrot_fast").model.diffusion_model.blocks[0].ffn[2]
    for x in (torch.randn(2, 3, 512), torch.randn(5, 512, dtype=torch.bfloat16)):
        for ticket in (None, torch.tensor(7)):
            arguments = (x, linear.handle.sized.shape[0], linear.out_features, "gelu_tanh", ticket)
            torch.library.opcheck(
                host.opaque_layer._layer.default, arguments, test_utils=("test_schema", "test_faketensor")
            )
    torch.library.opcheck(host.opaque_layer._take_ticket.default, (x,), test_utils=("test_schema", "test_faketensor"))


def test_no_two_calls_without_a_ticket_see_one_tensor(host, monkeypatch):
    """Inductor reuses a tensor's memory, with the tensor, for other values: what was quantized of it is not theirs."""
    seen: list[torch.Tensor] = []

    class Layer:
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x + 1

    layer = Layer()
    monkeypatch.setitem(host.opaque_layer._LAYERS, 7, layer)
    x = torch.randn(3, 256)
    for _ in range(2):
        host.opaque_layer._run(x, 7, 256, "", None)
    assert len({id(x), *map(id, seen)}) == 3
    assert {each.data_ptr() for each in seen} == {x.data_ptr()}


def test_linears_that_read_one_tensor_of_a_graph_have_one_group_in_each_of_its_runs(host, monkeypatch):
    seen: list[tuple[str, int]] = []
    original = host.operations.quantized_linear

    def recorded(x: torch.Tensor, *arguments: Any, input_group: str, **options: Any) -> torch.Tensor:
        seen.append((input_group, id(x)))
        return original(x, *arguments, input_group=input_group, **options)

    attention = load(host, "int8").model.diffusion_model.blocks[0].self_attn
    linears = [attention.q, attention.k, attention.v, attention.o]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def graph(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x.sin()
            x = sum(linear(x) for linear in linears)
        return x

    def plain(x: torch.Tensor) -> torch.Tensor:
        return sum(linear(sum(linear(x.sin()) for linear in linears).sin()) for linear in linears)

    for x in torch.randn(3, 1, 8, 256):
        want = plain(x)
        with monkeypatch.context() as patch:
            patch.setattr(host.operations, "quantized_linear", recorded)
            torch.testing.assert_close(graph(x), want)
    groups = [group for group, _ in seen]
    assert len(seen) == 3 * 2 * 4
    for first in range(0, len(seen), 4):
        assert len(set(seen[first : first + 3])) == 1
        assert groups[first] != ""
        assert groups[first + 3] == ""
        assert groups.count(groups[first]) == 3


def test_heads_in_a_graph_are_plain_tensors(host):
    model = load(host, "int8", "qwen_image.safetensors").model.diffusion_model
    to_q = model.transformer_blocks[0].attn.to_q
    x = torch.randn(1, 5, to_q.in_features)
    assert type(to_q(x)) is to_q.output_class
    got = torch.compile(lambda x: to_q(x).view(1, 5, 2, -1).transpose(1, 2), backend="aot_eager")(x)
    assert type(got) is torch.Tensor
    assert torch.equal(got, to_q(x).view(1, 5, 2, -1).transpose(1, 2))


def test_heads_that_somebody_keeps_or_a_graph_gets_from_outside_are_plain_tensors(host):
    """Those of this pack's class are not copied by `copy.deepcopy`, are no file's without it, and are no graph's inputs."""
    attention = load(host, "int8", "qwen_image.safetensors").model.diffusion_model.transformer_blocks[0].attn
    kept: list[torch.Tensor] = []
    attention.to_q.register_forward_hook(lambda _, __, out: kept.append(out))
    attention.to_k.forward = torch.compiler.disable(attention.to_k.forward)
    x = torch.randn(1, 5, attention.to_q.in_features)
    attention.to_q(x)
    assert torch.equal(copy.deepcopy(kept[0]), kept[0])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return attention.to_k(x).view(1, 5, 2, -1).transpose(1, 2).contiguous()

    assert torch.equal(torch.compile(heads, backend="aot_eager")(x), heads(x))


@pytest.mark.parametrize("name", ["head.head", "text_embedding.0", "blocks.0.norm3"])
def test_layers_in_16_bits_are_opaque_while_dynamic_vram_pages_them(host, name):
    module = load(host, "int8").model.diffusion_model.get_submodule(name)
    assert isinstance(module, host.opaque_layer.OpaqueWhilePaged)
    x, targets = torch.randn(3, 256), []

    def backend(graph, inputs):
        targets.append({node.target for node in graph.graph.nodes})
        return graph

    for paged in (False, True):
        if paged:
            module._v = object()
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
        assert (host.opaque_layer._layer in targets.pop()) is paged
        assert not targets


def test_what_is_trained_in_a_compiled_model_gets_its_gradient(host):
    with torch.inference_mode(False), torch.enable_grad():
        network = load(host, "int8").model.diffusion_model
        quantized, paged = network.blocks[0].self_attn.q, network.text_embedding[0]
        scale, paged._v = torch.ones(256, 1, requires_grad=True), object()
        quantized.weight_function = [lambda weight: weight * scale]
        for linear, trained in ((quantized, scale), (paged, paged.weight.requires_grad_())):
            torch.compile(linear, backend="aot_eager")(torch.randn(3, 256)).sum().backward()
            assert trained.grad.norm() > 0


def test_a_model_without_quantized_layers_keeps_cores_classes(host):
    model = load(host, "none").model
    assert not any(isinstance(module, host.opaque_layer.OpaqueWhilePaged) for module in model.modules())
