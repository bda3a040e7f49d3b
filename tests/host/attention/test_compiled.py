"""Under torch.compile: one piece, the right slices, everything core is told, and no compilation per block."""

from __future__ import annotations

import pytest
import torch

from lowbit.attention.schedule import Schedule

from .support import counts, fakes, layouts, options, override

# torch's own compiler says it of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph from another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that counts the graphs it gets."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


def test_a_compiled_model_is_traced_in_one_piece(host):
    target = override(host)
    q, k, v = layouts(*fakes.qkv(heads=4))[False]

    def layer(q, k, v):
        return target(host.core.attention_pytorch, q * 1, k, v, 4, _inside_attn_wrapper=True) + 1

    want = host.core.attention_pytorch(q, k, v, 4) + 1
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(q, k, v), want, rtol=1e-4, atol=1e-5)
    assert counts(target) == {"sdpa_like": 2}


def test_inductor_reads_a_slice_from_where_it_starts(host):
    target = override(host)
    x, weight = torch.randn(2, 9, 32), torch.randn(32, 96) * 0.2

    def layer(x, attention):
        q, k, v = (x @ weight).chunk(3, -1)
        return attention(q[:, 4:], k[:, 2:], v[:, 2:])

    def plain(q, k, v):
        return host.core.attention_pytorch(q, k, v, 4)

    def ours(q, k, v):
        return target(host.core.attention_pytorch, q, k, v, 4, _inside_attn_wrapper=True)

    with torch.no_grad():
        got = torch.compile(lambda x: layer(x, ours), fullgraph=True)(x)
        torch.testing.assert_close(got, layer(x, plain), rtol=1e-4, atol=1e-4)
    assert counts(target) == {"sdpa_like": 1}


def test_cores_function_is_told_what_it_would_be_told_uncompiled(host, monkeypatch):
    seen = []

    def attention_pytorch(*args, **kwargs):
        seen.append((args, kwargs))
        return host.core.attention_basic(*args, **kwargs)

    monkeypatch.setattr(host.core, "optimized_attention", attention_pytorch)
    monkeypatch.setattr(host.attention, "EXACT_FUNCTIONS", frozenset([attention_pytorch]))
    target = override(host, fakes.backend("absent", missing="not installed"))
    q, k, v = layouts(*fakes.qkv())[False]

    def layer(q, k, v, **told):
        return target(host.core.attention_pytorch, q * 1, k, v, 2, _inside_attn_wrapper=True, **told)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(q, k, v, low_precision_attention=False, attn_precision=torch.float32, scale=0.1)
    (args, kwargs) = seen.pop()
    assert args[5] is torch.float32
    assert kwargs["low_precision_attention"] is False
    assert kwargs["scale"] == 0.1
    compiled(q, k, v)
    (args, kwargs) = seen.pop()
    assert args[5] is None
    assert "low_precision_attention" not in kwargs
    target.exact_model_call = True
    compiled(q, k, v)
    assert seen.pop()[1]["low_precision_attention"] is False


def test_an_exact_compiled_call_ends_at_cores_exact_attention(host, monkeypatch):
    monkeypatch.setattr(host.core, "optimized_attention", lambda *args, **kwargs: torch.full((1, 9, 32), 7.0))
    target = override(host, fakes.backend("absent", missing="not installed"))
    q, k, v = layouts(*fakes.qkv())[False]
    want = host.core.attention_pytorch(q, k, v, 2)

    def layer(q, k, v):
        return target(
            host.core.attention_pytorch, q * 1, k, v, 2, _inside_attn_wrapper=True, low_precision_attention=False
        )

    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(q, k, v), want)
    assert counts(target) == {"core_pytorch": 1}


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(blocks=frozenset({1, 20})), Schedule(first_steps=1)])
def test_a_model_compiled_block_by_block_is_not_compiled_for_every_block_and_step(host, schedule):
    lossy, exact = fakes.backend("lossy", error_class="fast"), fakes.backend("exact")
    target = override(host, lossy, exact, schedule=schedule)
    q, _, _ = layouts(*fakes.qkv(kv_len=9))[False]
    graphs = Graphs()

    @torch.compile(backend=graphs)
    def block(x, transformer_options):
        return host.core.attention_pytorch(x, x, x, 2, transformer_options=transformer_options) + 1

    for step in range(3):
        target.exact_model_call = bool(schedule.first_steps) and step == 0
        for number in range(30):
            block(q, options(target, block_index=number))
    assert graphs.count <= 4, "0, 1 and any other number at most, and one more until it varies"
    wanted = 30 if schedule.first_steps else 3 * len(schedule.blocks)
    assert counts(target).get("exact", 0) == wanted


@torch.no_grad()
def test_audio_attention_does_not_break_the_graph(host, monkeypatch):
    import comfy.ldm.wan.model_multitalk as multitalk

    monkeypatch.setattr(multitalk, "optimized_attention", host.core.attention_pytorch)
    target = override(host)
    attention = multitalk.SingleStreamAttention(32, 8, 4, True, operations=torch.nn)
    x, audio = torch.randn(1, 12, 32), torch.randn(2, 5, 8)
    want = attention(x, audio, (2, 2, 3))
    graphs = Graphs()
    compiled = torch.compile(attention, backend=graphs, fullgraph=True)
    for _ in range(10):
        with host.routes.open(options(target)):
            torch.testing.assert_close(compiled(x, audio, (2, 2, 3)), want, rtol=1e-4, atol=1e-5)
    assert graphs.count == 1
    assert counts(target) == {"sdpa_like": 10}
