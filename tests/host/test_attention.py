"""The override on a model: it honours everything core passes, chains, routes the audio attention, and repeats a broken step."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from demo import comfyui
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.environment import Environment
from lowbit.attention.plan import Policy
from lowbit.attention.schedule import Schedule

_spec = importlib.util.spec_from_file_location(
    "attention_fakes", Path(__file__).parent.parent / "attention" / "fakes.py"
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)


@pytest.fixture(scope="module")
def host():
    """The host modules, with ComfyUI on its CPU setting."""
    try:
        path = comfyui.find()
    except comfyui.ComfyUIMissingError as error:
        pytest.skip(str(error))
    if str(path) not in sys.path:
        sys.path.append(str(path))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ldm.modules.attention
    import comfy.model_patcher

    from lowbit.host import attention, attention_hooks

    return types.SimpleNamespace(
        attention=attention,
        hooks=attention_hooks,
        core=comfy.ldm.modules.attention,
        patcher=comfy.model_patcher.ModelPatcher,
    )


def override(host, *backends, policy=None, schedule=None, previous=None):
    backends = backends or (fakes.backend("sdpa_like"),)
    dispatcher = Dispatcher(
        policy or Policy("auto", "fast"),
        backends=backends,
        ranks=fakes.rank(*(b.name for b in backends), budget=None),
    )
    return host.attention.AttentionOverride(dispatcher, schedule or Schedule(), previous)


def counts(target):
    return target.report()["calls_by_backend"]


def options(target, **more):
    return {"optimized_attention_override": target, **more}


def layouts(q, k, v):
    """The two input layouts of core: heads first, and merged."""
    merged = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    return {True: (q, k, v), False: merged}


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
    return host.attention.install(model, Policy(backend, budget), Schedule(), True, None)[0]


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


def test_install_leaves_the_model_alone_and_replaces_its_own(host):
    model = patcher(host)
    first = install(host, model)
    second = install(host, first, "sdpa")
    assert host.attention.find(model) is None
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    assert host.attention.find(first) is not host.attention.find(second)
    assert host.attention.find(second).previous is None
    assert host.attention.find(second).dispatcher.policy.backend == "sdpa"
    assert host.attention.find(second.clone()) is host.attention.find(second)
    for wrappers in second.wrappers.values():
        assert [len(w) for w in wrappers.values()] == [1]


def test_the_report_is_found_under_a_later_override(host):
    patched = install(host, patcher(host))
    patched.set_model_optimized_attention(host.core.attention_pytorch)
    assert host.attention.find(patched) is not None


@pytest.mark.parametrize(
    ("layout", "capability", "paired"),
    [
        ("TensorCoreNVFP4Layout", (12, 0), "sageattn_3_fp4"),
        ("TensorCoreFP8E4M3Layout", (9, 0), "sageattn_3_fp8"),
        ("TensorCoreFP8E4M3Layout", (8, 0), None),
        ("TensorCoreNVFP4Layout", (9, 0), None),
        ("TensorWiseINT8Layout", (9, 0), None),
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
    assert environment.load is not backends.load
    gpu = Environment("cuda", capability, "a GPU", (13, 0))
    assert host.attention.paired_backend(model, gpu) == paired


@torch.no_grad()
def test_audio_attention_is_routed_while_a_model_call_runs_and_only_then(host):
    import comfy.ldm.wan.model_multitalk as multitalk

    original = multitalk.optimized_attention
    attention = multitalk.SingleStreamAttention(32, 8, 4, True, operations=torch.nn)
    x, audio = torch.randn(1, 2 * 6, 32), torch.randn(2, 5, 8)
    want = attention(x, audio, (2, 2, 3))
    target = override(host)
    with host.hooks._ROUTES.open(options(target)):
        out = attention(x, audio, (2, 2, 3))
        with host.hooks._ROUTES.open(None):
            attention(x, audio, (2, 2, 3))
    torch.testing.assert_close(out, want)
    assert target.report()["calls"][0]["kv_len"] == 5
    assert multitalk.optimized_attention is original
    attention(x, audio, (2, 2, 3))
    assert sum(counts(target).values()) == 1


class Forward:
    """A diffusion model whose forward is one attention call; optionally broken whatever the attention."""

    def __init__(self, target, host, broken=False):
        self.target, self.host, self.broken = target, host, broken
        self.masks = []

    def __call__(self, x, timestep, context, attention_mask=None, transformer_options={}, **kwargs):  # noqa: B006
        self.masks.append(attention_mask)
        q, k, v = layouts(*fakes.qkv())[False]
        out = self.host.core.attention_pytorch(q, k, v, 2, transformer_options=options(self.target))
        return out / 0 if self.broken else out


def executor(forward, name="SomeModel"):
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    call.original = lambda x, timestep, context, attention_mask=None, transformer_options={}: None  # noqa: B006
    call.class_obj = type(name, (), {})()
    return call


def test_a_step_that_ends_in_nan_is_done_again_exactly(host):
    broken_later = iter([False] * 6)

    def late_nan(q, k, v, mask, scale):
        out = fakes.attend(q, k, v, mask, scale)
        return out if next(broken_later, True) is False else out * torch.nan

    target = override(host, fakes.backend("lossy", late_nan, error_class="fast"), fakes.backend("good"))
    hooks = host.hooks.SamplingHooks(target)
    run = executor(Forward(target, host))
    for _ in range(6):
        assert torch.isfinite(hooks.diffusion_model(run, None, None, None)).all()
    assert torch.isfinite(hooks.diffusion_model(run, None, None, None)).all()
    assert target.report()["model_calls_repeated"] == 1
    assert target.report()["struck_off"][0]["backend"] == "lossy"
    assert "repeated" in target.text()


def test_a_model_that_is_broken_itself_is_not_blamed_on_attention(host):
    target = override(host, fakes.backend("lossy", error_class="fast"), fakes.backend("good"))
    hooks = host.hooks.SamplingHooks(target)
    run = executor(Forward(target, host, broken=True))
    for _ in range(3):
        hooks.diffusion_model(run, None, None, None)
    assert target.report()["struck_off"] == []
    assert target.report()["model_calls_repeated"] == 1


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_qwens_text_mask_is_looked_at_once_a_run_and_dropped_when_idle(host, idle, by_keyword):
    target = override(host)
    hooks = host.hooks.SamplingHooks(target)
    forward = Forward(target, host)
    run = executor(forward, "QwenImageTransformer2DModel")
    text_mask = torch.ones(1, 7, dtype=torch.int64)
    text_mask[0, 0] = idle
    cond = {"uuid": "a", "model_conds": {"attention_mask": types.SimpleNamespace(cond=text_mask)}}
    guider = types.SimpleNamespace(conds={"positive": [cond]})
    transformer_options = options(target, uuids=["a"])
    given = {"attention_mask": text_mask} if by_keyword else {}
    positional = () if by_keyword else (text_mask,)

    def steps(*args, **kwargs):
        for _ in range(3):
            hooks.diffusion_model(run, None, None, None, *positional, transformer_options=transformer_options, **given)

    def sampling(*args, **kwargs):
        return hooks.sampler_sample(steps, guider, torch.tensor([1.0, 0.5, 0.0]))

    hooks.outer_sample(sampling)
    assert all((mask is None) is idle for mask in forward.masks)
    assert len(forward.masks) == 3
    other = executor(Forward(target, host), "AnotherModel")
    hooks.diffusion_model(other, None, None, None, text_mask, transformer_options=transformer_options)


def test_the_schedule_makes_the_right_steps_exact(host):
    target = override(host, schedule=Schedule(first_steps=1, last_steps=2))
    hooks = host.hooks.SamplingHooks(target)
    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0])
    exact = []

    def sampler(*args, **kwargs):
        for sigma in sigmas[:-1]:
            hooks.predict_noise(lambda *a, **k: exact.append(target.exact_model_call), None, sigma[None])

    hooks.outer_sample(lambda: hooks.sampler_sample(sampler, types.SimpleNamespace(conds={}), sigmas))
    assert exact == [True, False, False, True, True]
    assert target.exact_model_call is False


def test_a_compiled_model_is_traced_in_one_piece(host):
    torch._dynamo.reset()
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
    torch._dynamo.reset()
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


def microseconds(call, rounds=15, calls=1000):
    """The fastest round's time per call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


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
    assert added < 15 * fakes.slowness(), f"{added:.1f} us a call"
