"""The override on a model: it honours everything core passes, chains with other overrides, and never gets in the way."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.attention.candidates import Policy
from lowbit.attention.environment import Environment
from lowbit.attention.schedule import Schedule

from .support import counts, fakes, layouts, microseconds, options, override


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("mask", [None, "2d", "3d", "4d", "idle"])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_the_result_is_cores(host, skip_reshape, skip_output_reshape, mask, scale, gqa):
    q, k, v = layouts(*fakes.qkv(batch=2, heads=4, kv_heads=2 if gqa else 4))[skip_reshape]
    shapes = {"2d": (9, 11), "3d": (2, 9, 11), "4d": (2, 4, 9, 11), "idle": (2, 1, 11)}
    mask = None if mask is None else torch.zeros(shapes[mask]) if mask == "idle" else torch.randn(shapes[mask])
    keywords = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    keywords |= {} if scale is None else {"scale": scale}
    keywords |= {"enable_gqa": True} if gqa else {}
    want = host.core.attention_pytorch(q, k, v, 4, mask, **keywords)
    target = override(host)
    for arguments, extra in (((q, k, v, 4, mask), {}), ((q, k, v), {"heads": 4, "mask": mask})):
        out = host.core.attention_pytorch(*arguments, **keywords, **extra, transformer_options=options(target))
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert counts(target) == {"sdpa_like": 2}


def test_containers_are_unpacked(host):
    q, k, v = fakes.qkv()
    want = host.core.attention_pytorch(q, k, v, 2, skip_reshape=True)
    boxes = [host.core.AttentionTensorContainer(x) for x in (q, k, v)]
    target = override(host)
    out = host.core.attention_pytorch(*boxes, 2, skip_reshape=True, transformer_options=options(target))
    torch.testing.assert_close(out, want)
    assert counts(target) == {"sdpa_like": 1}


def test_core_gets_its_arguments_untouched_as_the_last_resort(host):
    seen = []

    def func(*args, **kwargs):
        seen.append((args, dict(kwargs)))
        return host.core.attention_pytorch(*args, **kwargs)

    q, k, v = layouts(*fakes.qkv())[False]
    mask = torch.randn(9, 11)
    target = override(host, fakes.backend("absent", missing="not installed"))
    keywords = {"transformer_options": options(target), "attn_precision": None, "_inside_attn_wrapper": True}
    target(func, q, k, v, 2, mask, **keywords)
    ((args, kwargs),) = seen
    assert all(a is b for a, b in zip(args, (q, k, v, 2, mask), strict=True))
    assert kwargs == keywords
    target(func, q, k, v, heads=2, unheard_of=1, **keywords)
    assert seen[1][1] == {**keywords, "heads": 2, "unheard_of": 1}


def test_an_idle_mask_is_dropped_for_core_too(host):
    seen = []

    def func(*args, **kwargs):
        seen.append((args, kwargs))
        return host.core.attention_pytorch(*args, **kwargs)

    q, k, v = layouts(*fakes.qkv())[False]
    target = override(host, fakes.backend("absent", missing="not installed"))
    idle = torch.ones(1, 1, 11, dtype=torch.bool)
    target(func, q, k, v, 2, idle, _inside_attn_wrapper=True)
    target(func, q, k, v, heads=2, mask=idle, _inside_attn_wrapper=True)
    assert seen[0][0][4] is None
    assert seen[1][1]["mask"] is None


@pytest.mark.parametrize("reason", ["low_precision", "precision", "block", "step"])
def test_what_must_be_exact_is(host, reason):
    lossy, exact = fakes.backend("lossy", error_class="fast"), fakes.backend("exact")
    target = override(host, lossy, exact, schedule=Schedule(blocks=frozenset({3})))
    q, k, v = layouts(*fakes.qkv())[False]
    keywords, block = {}, 0
    if reason == "low_precision":
        keywords["low_precision_attention"] = False
    elif reason == "precision":
        keywords["attn_precision"] = torch.float32
    elif reason == "block":
        block = 3
    else:
        target.exact_model_call = True
    wrapped = options(target, block_index=block)
    host.core.attention_pytorch(q, k, v, 2, transformer_options=wrapped, **keywords)
    assert counts(target) == {"exact": 1}
    target.exact_model_call = False
    host.core.attention_pytorch(q, k, v, 2, transformer_options=options(target, block_index=1))
    assert counts(target) == {"exact": 1, "lossy": 1}


def test_an_override_that_changes_attention_stays_in_front(host):
    def negated(func, q, k, v, *args, **kwargs):
        return -func(q, k, v, *args, **kwargs)

    q, k, v = layouts(*fakes.qkv())[False]
    want = -host.core.attention_pytorch(q, k, v, 2)
    target = override(host, previous=negated)
    out = host.core.attention_pytorch(q, k, v, 2, transformer_options=options(target))
    torch.testing.assert_close(out, want)
    assert counts(target) == {"sdpa_like": 1}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)


def patcher(host):
    return host.patcher(Model(), torch.device("cpu"), torch.device("cpu"))


def install(host, model, backend="auto", budget="balanced"):
    return host.installing.install_override(model, Policy(backend, budget), Schedule(), True, None)[0]


def test_cores_own_choice_becomes_the_last_resort(host):
    chosen = []

    def kernel(*args, **kwargs):
        chosen.append(kwargs)
        return host.core.attention_pytorch(*args, **kwargs)

    model = patcher(host)
    model.set_model_optimized_attention(kernel)
    patched = install(host, model)
    q, k, v = layouts(*fakes.qkv())[False]
    want = host.core.attention_pytorch(q, k, v, 2)
    wrapped = patched.model_options["transformer_options"]
    torch.testing.assert_close(host.core.attention_pytorch(q, k, v, 2, transformer_options=wrapped), want)
    assert len(chosen) == 1, "nothing is measured on a CPU, so the call ends at the kernel the user chose"


@pytest.mark.parametrize("request_exact", ["budget", "low_precision", "precision", "step"])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_what_must_be_exact_never_ends_at_a_lossy_kernel_chosen_before(host, backend, request_exact):
    """As with --use-sage-attention or the INT8 choice of ModelAttentionBackend."""

    def lossy(*args, **kwargs):
        return host.core.attention_pytorch(*args, **kwargs) + 100

    model = patcher(host)
    model.set_model_optimized_attention(lossy)
    patched = install(host, model, backend, "exact" if request_exact == "budget" else "fast")
    target = host.installing.find_override(patched)
    target.exact_model_call = request_exact == "step"
    keywords = {
        "low_precision": {"low_precision_attention": False},
        "precision": {"attn_precision": torch.float32},
    }.get(request_exact, {})
    q, k, v = layouts(*fakes.qkv())[False]
    keywords |= {"transformer_options": patched.model_options["transformer_options"]}
    want = host.core.attention_pytorch(q, k, v, 2)
    for _ in range(3):
        torch.testing.assert_close(host.core.attention_pytorch(q, k, v, 2, **keywords), want, rtol=1e-3, atol=1e-4)
    assert counts(target).keys() <= {"core_pytorch", "sdpa"}


def test_cores_exact_functions_are_known_wrapped_and_bare(host):
    core = host.core
    for function in (core.attention_pytorch, core.attention_sub_quad, core.attention_split, core.attention_basic):
        assert function in host.attention.EXACT_FUNCTIONS
        assert function.__wrapped__ in host.attention.EXACT_FUNCTIONS, "what core hands to an override"
    for function in (core.attention_sage, core.attention3_sage, core.attention_comfy_kitchen_int8):
        assert function not in host.attention.EXACT_FUNCTIONS
        assert function.__wrapped__ not in host.attention.EXACT_FUNCTIONS
    model = patcher(host)
    model.set_model_optimized_attention(core.attention_pytorch)
    assert host.installing.find_override(install(host, model))._chosen is core.attention_pytorch


def test_calls_that_cannot_be_taken_are_counted_and_stay_exact(host):
    def lossy(*args, **kwargs):
        kwargs.pop("unheard_of", None)
        return host.core.attention_pytorch(*args, **kwargs) + 100

    q, k, v = layouts(*fakes.qkv())[False]
    target = override(host)
    keywords = {"heads": 2, "_inside_attn_wrapper": True, "unheard_of": 1}
    assert target(lossy, q, k, v, **keywords).mean() > 50
    out = target(lossy, q, k, v, **keywords, low_precision_attention=False)
    torch.testing.assert_close(out, host.core.attention_pytorch(q, k, v, 2))
    flat = k.transpose(1, 2)
    target(lambda *args, **kwargs: torch.zeros(1), q, flat, flat, heads=2)
    assert target.report()["unhandled"] == [
        {"reason": host.attention.UNKNOWN_ARGUMENTS, "calls": 2},
        {"reason": host.attention.UNKNOWN_SHAPES, "calls": 1},
    ]
    assert "core: 2 calls as they came" in target.text()
    assert counts(target) == {}


def test_install_leaves_the_model_alone_and_replaces_its_own(host):
    model = patcher(host)
    first = install(host, model)
    second = install(host, first, "sdpa")
    assert host.installing.find_override(model) is None
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    assert host.installing.find_override(first) is not host.installing.find_override(second)
    assert host.installing.find_override(second).previous is None
    assert host.installing.find_override(second).dispatcher.policy.backend == "sdpa"
    assert host.installing.find_override(second.clone()) is host.installing.find_override(second)
    for wrappers in second.wrappers.values():
        assert [len(w) for w in wrappers.values()] == [1]


def test_the_report_is_found_under_a_later_override(host):
    patched = install(host, patcher(host))
    patched.set_model_optimized_attention(host.core.attention_pytorch)
    assert host.installing.find_override(patched) is not None


@pytest.mark.parametrize(
    ("layout", "capability", "paired"),
    [
        ("TensorCoreNVFP4Layout", (12, 0), ("sageattn_3_fp4",)),
        ("TensorCoreFP8E4M3Layout", (9, 0), ("lowbit_int8_fp8", "lowbit_int8_fp16", "sageattn_3_fp8")),
        ("TensorCoreFP8E4M3Layout", (8, 0), ("lowbit_int8_fp16",)),
        ("TensorCoreNVFP4Layout", (9, 0), ()),
        ("TensorWiseINT8Layout", (9, 0), ("lowbit_int8_fp8", "lowbit_int8_fp16", "sageattn_3_fp8")),
        ("AnotherLayout", (9, 0), ()),
    ],
)
def test_weights_are_paired_with_attention_of_their_precision(host, monkeypatch, layout, capability, paired):
    model = Model()
    model.quantized = torch.nn.Module()
    model.quantized.weight = types.SimpleNamespace(_layout_cls=layout, shape=(8, 8))
    from lowbit.attention import backends, environment

    stand_in = types.SimpleNamespace(
        sageattn3_blackwell=None, sageattn_qk_int8_pv_fp8_cuda=None, SM89_ENABLED=True, SM90_ENABLED=True
    )
    monkeypatch.setattr(backends, "load", lambda name: (stand_in, ""))
    monkeypatch.setattr(backends.int8, "missing_triton", lambda device: None)
    assert environment.load is not backends.load
    gpu = Environment("cuda", capability, "a GPU", (13, 0))
    assert host.installing.paired_backends(model, gpu) == paired


def test_a_warm_call_through_the_override_adds_less_than_15_microseconds(host):
    """Against a bare kernel on the same views: splitting and merging heads is core's work too."""
    q, k, v = layouts(*fakes.qkv(heads=2, q_len=1, kv_len=1))[False]
    ready = fakes.attend(*fakes.qkv(heads=2, q_len=1, kv_len=1))
    target = override(host, fakes.backend("instant", lambda q, k, v, mask, scale: ready))
    keywords = {"heads": 2, "transformer_options": options(target, block_index=3), "_inside_attn_wrapper": True}

    def through():
        return target(host.core.attention_pytorch, q, k, v, **keywords)

    def bare():
        for x in (q, k, v):
            x.view(1, 1, 2, 16).transpose(1, 2)
        return ready.transpose(1, 2).reshape(1, 1, 32)

    for _ in range(10):
        through()
    added = microseconds(through) - microseconds(bare)
    assert added < 15, f"{added:.1f} us a call"
