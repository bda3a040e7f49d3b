"""Every attention backend present on this GPU against float32, on awkward layouts and values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit.attention import checks
from lowbit.attention.backends import BACKENDS, ERROR_LIMITS, AttentionCall
from lowbit.attention.candidates import AttentionInputs, Policy
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.environment import detect
from lowbit.attention.planning import TIMINGS_FILE
from lowbit.kernels.measured import MeasuredNumbers

NAMES = [backend.name for backend in BACKENDS]


class KnownTimes:
    """Timings that say of every shape: this is the fastest."""

    def __init__(self, name):
        self.times = {backend.name: 2.0 for backend in BACKENDS} | {"core": 3.0} | {name: 1.0}

    def get(self, environment, call):
        return dict(self.times)


def reference(q, k, v, mask=None, scale=None):
    """Attention in float32, (batch, heads, length, head_dim)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1) @ v.float()


def make(batch=1, heads=4, q_len=700, kv_len=700, head_dim=128, kv_heads=None, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(3)
    return [
        torch.randn(batch, n, length, head_dim, device="cuda", dtype=dtype, generator=generator)
        for n, length in ((heads, q_len), (kv_heads or heads, kv_len), (kv_heads or heads, kv_len))
    ]


def bound(name, q, k, v, mask=None, scale=None):
    """The backend's kernel for these tensors; skips the test where it is not there or does not take them."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    environment = detect(q.device)
    reason = backend.why_not_here(environment) or backend.why_not(AttentionCall.of(q, k, v, mask, scale), environment)
    if reason is None and not backend.accepts(q, k, v, mask):
        reason = "torch has no such kernel for these tensors"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    kernel = backend.bind(environment)

    def call(q, k, v, mask=None, scale=None):
        q, k, v = (checks.prepared(x, backend.contiguous) for x in (q, k, v))
        return kernel(q, k, v, mask, scale)

    return call, min(ERROR_LIMITS[backend.error_class], 0.3)


def close(out, want, limit):
    assert torch.isfinite(out).all()
    error = float((out.float() - want).norm() / want.norm())
    assert error <= limit, f"relative error {error:.3g} over {limit:g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("name", NAMES)
def test_each_backend_is_within_its_error_class(name, head_dim, dtype):
    q, k, v = make(head_dim=head_dim, dtype=dtype)
    call, limit = bound(name, q, k, v)
    close(call(q, k, v), reference(q, k, v), limit)


@pytest.mark.parametrize("name", NAMES)
def test_k_survives_and_a_constant_offset_on_k_does_no_harm(name):
    q, k, v = make()
    k += 10 * torch.randn(1, 4, 1, 128, device="cuda", dtype=k.dtype)
    call, limit = bound(name, q, k, v)
    before = [x.clone() for x in (q, k, v)]
    close(call(q, k, v), reference(q, k, v), limit)
    for now, then in zip((q, k, v), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_ones_own_is_honoured(name):
    q, k, v = make()
    call, limit = bound(name, q, k, v, scale=0.06)
    close(call(q, k, v, scale=0.06), reference(q, k, v, scale=0.06), limit)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_heads(name):
    q, k, v = make(heads=8, kv_heads=2)
    call, limit = bound(name, q, k, v)
    close(call(q, k, v), reference(q, k, v), limit)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_are_applied(name, kind):
    q, k, v = make()
    mask = torch.rand(1, 1, 700, 700, device="cuda") < 0.7
    if kind == "float":
        mask = torch.randn(1, 1, 1, 700, device="cuda", dtype=q.dtype) * 3
    call, limit = bound(name, q, k, v, mask)
    close(call(q, k, v, mask), reference(q, k, v, mask), limit)


@pytest.mark.parametrize("view", ["token_major", "fused_qkv", "off_by_one", "expanded", "every_other_token"])
@pytest.mark.parametrize("name", NAMES)
def test_any_view_gives_what_its_contiguous_copy_gives(name, view):
    q, k, v = make(q_len=515, kv_len=515)
    if view == "token_major":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif view == "fused_qkv":
        q, k, v = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    elif view == "off_by_one":
        q, k, v = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))
        assert q.data_ptr() % 16
    elif view == "expanded":
        k, v = (x[:, :1].expand(-1, 4, -1, -1) for x in (k, v))
    else:
        q, k, v = (x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v))
    call, limit = bound(name, q, k, v)
    close(call(q, k, v), reference(q, k, v), limit)


@pytest.mark.parametrize("name", NAMES)
def test_values_past_float16_do_not_turn_into_nan(name):
    q, k, v = make()
    v = v * 30000 + 50000
    call, _ = bound(name, q, k, v)
    close(call(q, k, v), reference(q, k, v), 0.1)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 700), (700, 3), (129, 127)])
@pytest.mark.parametrize("name", NAMES)
def test_odd_lengths(name, lengths):
    q, k, v = make(q_len=lengths[0], kv_len=lengths[1])
    call, limit = bound(name, q, k, v)
    close(call(q, k, v), reference(q, k, v), max(limit, 8e-3))


@pytest.mark.parametrize("backend", ["auto", *NAMES])
def test_the_dispatcher_stays_within_the_budget_whatever_is_asked_for(backend):
    q, k, v = make(q_len=2048, kv_len=2048)
    k[..., ::32] *= 8
    want = reference(q, k, v).transpose(1, 2).flatten(2)
    dispatcher = Dispatcher(Policy(backend, "fast"))

    def core(drop):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for _ in range(7):
        out = dispatcher.run(AttentionInputs(q, k, v, None, None, False, core))
    close(out, want, ERROR_LIMITS["fast"] if backend == "auto" else 0.5)
    rows = dispatcher.report.as_dict(dispatcher.settings(q.device))["calls"]
    assert sum(row["calls"] for row in rows) == 7
    assert all(row["ms_per_call"] for row in rows if row["calls"] > 2)


def test_attention_can_be_captured_in_a_graph():
    q, k, v = make()
    dispatcher = Dispatcher(Policy("cudnn"))

    def core(drop):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for _ in range(7):
        dispatcher.run(AttentionInputs(q, k, v, None, None, False, core))
    graph = torch.cuda.CUDAGraph()
    fresh = Dispatcher(Policy("auto"))
    with torch.cuda.graph(graph):
        known = dispatcher.run(AttentionInputs(q, k, v, None, None, False, core))
        unknown = fresh.run(AttentionInputs(q, k, v, None, None, False, core))
    graph.replay()
    want = reference(q, k, v).transpose(1, 2).flatten(2)
    close(known, want, 6e-3)
    close(unknown, want, 6e-3)


def torch_sdpa(q, k, v):
    """What stands for core: SDPA with the heads merged."""
    return lambda drop: torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def counted(call, calls):
    """The same function, which notes its calls."""
    return lambda drop: calls.append(drop) or call(drop)


def test_auto_times_the_backends_once_and_keeps_the_budget(tmp_path):
    q, k, v = make(heads=8, q_len=4096, kv_len=4096)
    taken = []
    for _ in range(2):
        dispatcher = Dispatcher(Policy("auto", "fast"), MeasuredNumbers(tmp_path, TIMINGS_FILE))
        own = []
        for _ in range(7):
            core = counted(torch_sdpa(q, k, v), own)
            out = dispatcher.run(AttentionInputs(q, k, v, None, None, False, core))
        close(out, reference(q, k, v).transpose(1, 2).flatten(2), ERROR_LIMITS["fast"])
        report = dispatcher.report.as_dict(dispatcher.settings(q.device))
        assert not report["struck_off"]
        taken.append((len(own) > 7, report["calls_by_backend"]))
    assert taken[0][1] == taken[1][1]
    assert not taken[1][0] or "core" in taken[1][1], "known from the file the second time"


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.error_class in ("balanced", "fast")])
def test_a_lossy_backend_is_compared_in_every_block_and_then_once_a_model_call(name):
    q, k, v = make(heads=8, q_len=2048, kv_len=2048)
    bound(name, q, k, v)
    backends = tuple(backend for backend in BACKENDS if backend.name in (name, "sdpa"))
    dispatcher = Dispatcher(Policy("auto", "fast"), KnownTimes(name), backends=backends)
    compared = []
    plain = dispatcher._error
    dispatcher._error = lambda *args: compared.append(1) or plain(*args)
    for _ in range(4):
        dispatcher.begin_model_call()
        for _ in range(10):
            dispatcher.run(AttentionInputs(q, k, v, None, None, False, torch_sdpa(q, k, v)))
    assert len(compared) == 10 + 3
    (row,) = dispatcher.report.as_dict(dispatcher.settings(q.device))["calls"]
    assert row["backend"] == name
    assert 0 < row["error"] <= ERROR_LIMITS["fast"]


def test_auto_gives_way_to_comfyuis_own_where_that_is_faster():
    q, k, v = make(heads=8, q_len=2001, kv_len=2001)
    kernel, _ = bound("sdpa", q, k, v)

    def slow(*args):
        for _ in range(20):
            out = kernel(*args)
        return out

    sdpa = next(backend for backend in BACKENDS if backend.name == "sdpa")
    for own, bind, taken in ((kernel, slow, "core"), (slow, kernel, "sdpa")):
        backend = dataclasses.replace(sdpa, bind=lambda environment, bind=bind: bind)
        dispatcher = Dispatcher(Policy("auto", "exact"), backends=(backend,))
        for _ in range(10):

            def core(drop, own=own):
                return own(q, k, v, None, None).transpose(1, 2).flatten(2)

            out = dispatcher.run(AttentionInputs(q, k, v, None, None, False, core))
            close(out, reference(q, k, v).transpose(1, 2).flatten(2), 6e-3)
        assert dispatcher.report.as_dict(dispatcher.settings(q.device))["calls_by_backend"] == {taken: 10}


def test_a_mask_that_was_idle_before_is_kept_in_a_captured_graph():
    q, k, v = make()
    mask = torch.zeros(1, 1, 1, 700, device="cuda", dtype=q.dtype)
    dispatcher = Dispatcher(Policy("sdpa"))

    def core(drop):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None if drop else mask)

    for _ in range(7):
        dispatcher.run(AttentionInputs(q, k, v, mask, None, False, core))
    assert dispatcher.report.masks_dropped == 7
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dispatcher.run(AttentionInputs(q, k, v, mask, None, False, core))
    mask[..., :300] = -torch.inf
    graph.replay()
    close(out, reference(q, k, v, mask).transpose(1, 2).flatten(2), 6e-3)


def test_a_lossy_core_on_the_gpu_is_held_to_the_budget():
    q, k, v = make(q_len=1024, kv_len=1024)
    exact = torch_sdpa(q, k, v)
    for error, taken in ((1e-3, "core"), (0.3, "core_pytorch")):
        dispatcher = Dispatcher(Policy("auto", "balanced"), KnownTimes("core"), backends=(BACKENDS[-1],))

        def lossy(drop, error=error):
            out = exact(drop)
            return out + error * out.std() * torch.randn_like(out)

        for _ in range(7):
            dispatcher.run(
                AttentionInputs(q, k, v, None, None, False, lossy, core_exact=exact, core_name="attention_sage")
            )
        assert dispatcher.report.as_dict(dispatcher.settings(q.device))["calls_by_backend"] == {taken: 7}
