"""Every architecture with this pack's modulation, norms and rotary embeddings beside ComfyUI's own."""

from __future__ import annotations

import types
from collections import Counter

import pytest
import torch
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from lowbit.kernels.repeated_launch import traits_of
from lowbit.kernels.rope import rope_launch
from testing.measure import relative_error
from testing.tiny.architectures import ARCHITECTURES

CALLED = {
    "Wan 2.2 T2V 14B": {"modulate_rows": 9, "normalize": 15, "rope": 4},
    "Wan VACE": {"modulate_rows": 13, "normalize": 22, "rope": 6},
    "Qwen-Image": {"modulate_rows": 12, "normalize": 18, "rope": 4},
    "Flux": {"modulate_rows": 11, "normalize": 23, "rope": 8},
}
"""Two blocks, of Flux two of each kind, and what stands around them; of other architectures it is not said."""


@pytest.fixture
def elementwise(host):
    from lowbit.host.weights import elementwise

    return elementwise


def rope_in_plain_torch(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor | None:
    """What the kernel would give for what it takes: it has no other form on a CPU."""
    if rope_launch(traits_of(x), traits_of(freqs)) is None:
        return None
    return (freqs.float() * x.float().unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2).to(x.dtype)


def counted(elementwise, monkeypatch) -> Counter[str]:
    """Which of them is called how often from now on."""
    monkeypatch.setattr(elementwise, "rope", rope_in_plain_torch)
    calls: Counter[str] = Counter()
    for name in ("modulate_rows", "normalize", "rope"):
        function = getattr(elementwise, name)

        def called(*args, name=name, function=function, **options):
            out = function(*args, **options)
            calls[name] += out is not None
            assert type(out) in (torch.Tensor, types.NoneType)
            return out

        monkeypatch.setattr(elementwise, name, called)
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_what_it_gave(elementwise, monkeypatch, name):
    of = ARCHITECTURES[name]
    model = of.small()
    model.load_state_dict(of.weights(), strict=False)
    elementwise.speed_up_elementwise(model)
    calls = counted(elementwise, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "_stays_with_torch", lambda x: True)
        want = of.run(model)
        assert not calls
    got = of.run(model)
    assert relative_error(got, want) < 1e-5
    assert calls == CALLED.get(name, calls)


def plain_norm(x, weight, bias, eps, *, centered):
    """What the kernel would give: PyTorch's RMSNorm, which is taken on a CPU, has no bias at all."""
    assert not centered
    out = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias


@pytest.fixture
def ops(core_modules):
    import comfy.ops

    return comfy.ops.manual_cast


def test_a_bias_that_core_leaves_to_others_is_not_added_twice(elementwise, ops, monkeypatch):
    monkeypatch.setattr(elementwise, "normalize", plain_norm)
    norm = ops.RMSNorm(24)
    norm.weight, norm.bias = (torch.nn.Parameter(torch.randn(24), requires_grad=False) for _ in range(2))
    x = torch.randn(2, 5, 24)
    elementwise.speed_up_elementwise(norm)
    with torch.inference_mode():
        assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (24,), norm.weight, norm.eps))


def test_a_norm_is_told_of_rows_of_another_length(elementwise, ops):
    norm = ops.LayerNorm(24, elementwise_affine=False)
    elementwise.speed_up_elementwise(norm)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(2, 5, 12))


def test_what_others_made_of_a_norm_is_theirs(elementwise, ops):
    class Twice(ops.LayerNorm):
        def forward_comfy_cast_weights(self, input):
            return 2 * super().forward_comfy_cast_weights(input)

    class Moved(ops.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    norms = torch.nn.ModuleList([Twice(8), Moved(8)]).requires_grad_(False)
    for norm in norms:
        norm.weight, norm.bias = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(8))
    x = torch.randn(3, 8, 8)
    with torch.inference_mode():
        want = [norm(x) for norm in norms]
        elementwise.speed_up_elementwise(norms)
        assert all(torch.equal(norm(x), before) for norm, before in zip(norms, want, strict=True))
    assert [isinstance(norm, elementwise._Norm) for norm in norms] == [False, True]


@pytest.fixture
def attention(elementwise, ops):
    """Qwen-Image's, and the inputs of two prompts: image and texts."""
    from comfy.ldm.qwen_image.model import Attention

    made = Attention(query_dim=24, dim_head=8, heads=3, operations=ops).requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    angles = torch.randn(1, 1, 12, 4)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    return made, (torch.randn(2, 7, 24), torch.randn(2, 5, 24), None, None, turns)


@pytest.mark.parametrize("norms", [True, False])
def test_heads_are_normalized_and_joined_as_they_lie(elementwise, attention, monkeypatch, norms):
    """What core sees stays the same, to the strides, also where its own norm reads the heads."""
    attention, inputs = attention
    seen: list[torch.Tensor] = []
    joined = []
    monkeypatch.setattr(elementwise, "join_heads", lambda *parts: joined.append(parts) or torch.cat(parts, dim=2))
    patches = {"patches": {"attn1_patch": [lambda q, k, v, **_: seen.extend((q, k, v)) or {}]}}
    with torch.inference_mode():
        want = attention(*inputs, patches)
        if norms:
            elementwise.speed_up_elementwise(attention)
        for name in elementwise._PROJECTIONS:
            attention.get_submodule(name).register_forward_hook(lambda _, __, out: out.as_subclass(elementwise._Heads))
        lying = []
        normalize = elementwise.normalize
        monkeypatch.setattr(
            elementwise, "normalize", lambda x, *parts, **how: lying.append(x) or normalize(x, *parts, **how)
        )
        got = attention(*inputs, patches)
    for one, other in zip((*got, *seen[3:]), (*want, *seen[:3]), strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert len(joined) == 1
    assert [x.is_contiguous() for x in lying] == [False] * 4 * norms
    assert {type(x) for x in lying} <= {torch.Tensor}


def by_heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 7, 3, 8).transpose(1, 2)


USES = {
    "written to": lambda x: (y := by_heads(x).contiguous(), y.mul_(3), y)[-1],
    "a part written to": lambda x: (y := by_heads(x).contiguous(), y[:, 1].zero_(), y.view(2, -1))[-1],
    "set": lambda x: (y := by_heads(x).contiguous(), y.__setitem__((0, 1), 5), y + y)[-1],
    "in a list": lambda x: torch.stack([by_heads(x).contiguous(), by_heads(x).contiguous()]),
    "by keyword": lambda x: torch.cat(tensors=[by_heads(x), by_heads(x)], dim=2),
    "in another order": lambda x: torch.cat([by_heads(x), by_heads(x)], 1),
    "looked at": lambda x: torch.tensor([*by_heads(x).contiguous().stride(), by_heads(x).contiguous().is_contiguous()]),
    "in rows": lambda x: by_heads(x).reshape(2, -1),
    "as it is": lambda x: x * 2,
}


@pytest.mark.parametrize("use", USES)
def test_heads_are_to_others_what_they_would_be(elementwise, use):
    x = torch.randn(2, 7, 24)
    with torch.inference_mode():
        want = USES[use](x.clone())
        given = x.clone()
        got = USES[use](given.as_subclass(elementwise._Heads))
        assert torch.equal(torch.as_tensor(got).as_subclass(torch.Tensor), want)
        assert torch.equal(given, x)


def test_heads_are_joined_by_torch_where_kernels_do_not_run(elementwise, monkeypatch):
    """On another GPU than the current one a kernel would be given memory of both."""
    monkeypatch.setattr(elementwise, "_stays_with_torch", lambda x: True)
    monkeypatch.setattr(elementwise, "join_heads", None)
    texts, image = torch.randn(2, 5, 3, 8).transpose(1, 2), by_heads(torch.randn(2, 7, 24))
    with torch.inference_mode():
        heads = [x.as_subclass(elementwise._Heads) for x in (texts, image)]
        assert torch.equal(torch.cat(heads, dim=2), torch.cat([texts, image], dim=2))


def test_projections_of_a_quantized_model_give_heads(elementwise, attention, core_modules):
    from lowbit.host.weights.operations import QuantizedLinear

    attention, _ = attention
    attention.to_q.__class__ = type("Linear", (QuantizedLinear, type(attention.to_q)), {})
    elementwise.speed_up_elementwise(torch.nn.ModuleDict({"block": attention, "other": torch.nn.Linear(2, 2)}))
    assert attention.to_q.output_class is elementwise._Heads
    assert not hasattr(attention.to_k, "output_class")


def test_what_kernels_do_not_run_on_is_left_to_core(elementwise, monkeypatch):
    """Another GPU than the current one, and a GPU that is older than Ampere."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    x = [types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in range(2)]
    for capability, stays in (((9, 0), [True, False]), ((7, 5), [True, True])):
        monkeypatch.setattr(elementwise, "compute_capability", lambda index, capability=capability: capability)
        with torch.inference_mode():
            assert [elementwise._stays_with_torch(one) for one in x] == stays


@pytest.mark.parametrize("taken", [True, False])
def test_rotary_embeddings_in_a_graph_are_ours_where_the_kernel_takes_them(elementwise, host, monkeypatch, taken):
    import comfy.ldm.flux.math as core

    elementwise.speed_up_elementwise(torch.nn.Module())
    q, k, freqs = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(1, 1, 5, 4, 2, 2)
    want = core.apply_rope1(q, freqs), *core.apply_rope(q, k, freqs)
    calls = counted(elementwise, monkeypatch)
    if not taken:
        monkeypatch.setattr(elementwise, "rope", lambda x, freqs: None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def graph(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return core.apply_rope1(q, freqs), *core.apply_rope(q, k, freqs)

    with torch.no_grad():
        for got, expected in zip(graph(q, k), want, strict=True):
            torch.testing.assert_close(got, expected)
            assert got.is_contiguous()
    assert calls["rope"] == (3 if taken else 0)


def test_rotary_embeddings_keep_no_model_out_of_cuda_graphs(elementwise):
    """Those of models that this pack has not loaded take them too; what looks weights up stays out."""
    graph = torch.fx.Graph()
    graph.output(
        graph.call_function(torch.ops.lowbit.rope.default, (graph.placeholder("x"), graph.placeholder("freqs")))
    )
    assert get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph)) is None
