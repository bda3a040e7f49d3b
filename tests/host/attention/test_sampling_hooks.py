"""Around a sampling run: the schedule, text masks, audio attention, the last check of each model call, who gets in the way."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from lowbit.attention.schedule import CALLS_AHEAD, Schedule

from .support import counts, fakes, layouts, options, override


@torch.no_grad()
def test_audio_attention_is_routed_while_a_model_call_runs_and_only_then(host):
    import comfy.ldm.wan.model_multitalk as multitalk

    original = multitalk.optimized_attention
    attention = multitalk.SingleStreamAttention(32, 8, 4, True, operations=torch.nn)
    x, audio = torch.randn(1, 2 * 6, 32), torch.randn(2, 5, 8)
    want = attention(x, audio, (2, 2, 3))
    target = override(host)
    with host.routes.open(options(target)):
        out = attention(x, audio, (2, 2, 3))
        with host.routes.open(None):
            attention(x, audio, (2, 2, 3))
    torch.testing.assert_close(out, want)
    assert target.report()["calls"][0]["kv_len"] == 5
    assert multitalk.optimized_attention is original
    assert host.routes.options is None
    attention(x, audio, (2, 2, 3))
    assert sum(counts(target).values()) == 1


@torch.no_grad()
def test_wan_animates_face_attention_comes_through(host):
    """It passes q with its heads merged and k and v with theirs apart."""
    import comfy.ldm.wan.model_animate as animate

    block = animate.FaceBlock(hidden_size=32, heads_num=4, operations=torch.nn)
    x, motion = torch.randn(1, 12, 32), torch.randn(1, 3, 5, 32)
    want = block(x, motion)
    target = override(host)
    with host.routes.open(options(target)):
        torch.testing.assert_close(block(x, motion), want, rtol=1e-4, atol=1e-5)
    assert counts(target) == {"sdpa_like": 1}
    assert target.report()["calls"][0]["kv_len"] == 5
    assert target.report()["unhandled"] == []


@pytest.mark.parametrize("name", ["model_multitalk", "model_animate", "model_wandancer", "ar_model"])
def test_every_module_that_passes_no_options_is_routed(host, name):
    module = importlib.import_module(f"comfy.ldm.wan.{name}")
    assert module.__name__ in sys.modules
    q, k, v = layouts(*fakes.qkv())[False]
    target = override(host)
    with host.routes.open(options(target)):
        first = module.optimized_attention
        module.optimized_attention(q, k, v, heads=2)
    with host.routes.open(options(target)):
        assert module.optimized_attention is first, "one function, or a compiled model is compiled at every model call"
    assert counts(target) == {"sdpa_like": 1}


class BaseModel:
    """Stands for core's BaseModel: one attention call a model call, through core's own chain of wrappers."""

    def __init__(self, host, target, hooks, broken=False, network="UNetModel", many=False, uses=None):
        self.host, self.target, self.hooks, self.broken, self.many = host, target, hooks, broken, many
        self.uses = uses
        self.diffusion_model = type(network, (), {})()
        self.masks = []

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        chain = self.host.executor.new_class_executor(self._apply_model, self, [self.hooks.apply_model])
        return chain.execute(x, t, c_concat, c_crossattn, control, transformer_options or {}, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        self.masks.append(kwargs.get("attention_mask"))
        q, k, v = layouts(*fakes.qkv())[False]
        out = self.host.core.attention_pytorch(q, k, v, 2, transformer_options=options(self.target))
        if self.uses is not None:
            out = self.uses(out, control, transformer_options)
        out = out / 0 if self.broken else out
        return [out, out] if self.many else out


class LateNan:
    """An attention that makes NaN from a call on."""

    def __init__(self, good):
        self.good = good

    def __call__(self, q, k, v, mask, scale):
        self.good -= 1
        out = fakes.attend(q, k, v, mask, scale)
        return out if self.good >= 0 else out * torch.nan


def late_nan(host, good=6, **model):
    """A model whose lossy attention makes NaN from call `good` on, unseen by the checks of single calls."""
    target = override(host, fakes.backend("lossy", LateNan(good), error_class="fast"), fakes.backend("good"))
    target.dispatcher._check = lambda *args: None
    return target, BaseModel(host, target, host.hooks.AttentionHooks(target), **model)


@pytest.mark.parametrize("many", [False, True])
def test_a_model_call_that_ends_in_nan_is_made_again_exactly(host, many):
    """Also when the model gives a list of outputs, one a modality."""
    target, model = late_nan(host, many=many)
    for _ in range(7):
        out = model.apply_model(None, None)
        assert all(torch.isfinite(x).all() for x in (out if many else [out]))
    assert target.report()["model_calls_repeated"] == 1
    assert target.report()["struck_off"][0]["backend"] == "lossy"
    assert "repeated" in target.text()


def test_a_repeated_call_of_a_unet_has_its_controlnet_again(host):
    from comfy.ldm.modules.diffusionmodules.openaimodel import apply_control

    target, model = late_nan(host, uses=lambda out, control, options: apply_control(out, control, "middle"))
    for _ in range(8):
        control = {"middle": [torch.full((1,), 100.0)], "input": []}
        out = model.apply_model(None, None, None, None, control)
        assert float(out.mean()) > 50, "the control shows"
        assert control["middle"] == []
    assert target.report()["model_calls_repeated"] == 1


def test_a_repeated_call_of_an_autoregressive_model_has_its_caches_back(host):
    ends = []

    def uses(out, control, transformer_options):
        (cache,) = transformer_options["ar_state"]["kv_caches"]
        ends.append(cache["end"])
        cache["end"] += 1
        return out

    target, model = late_nan(host, uses=uses)
    state = {"ar_state": {"kv_caches": [{"end": 0}], "crossattn_caches": None}}
    for _ in range(8):
        model.apply_model(None, None, transformer_options=state)
    assert ends == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    assert target.report()["model_calls_repeated"] == 1


def test_a_model_that_is_broken_itself_is_not_blamed_on_attention(host):
    target = override(host, fakes.backend("lossy", error_class="fast"), fakes.backend("good"))
    model = BaseModel(host, target, host.hooks.AttentionHooks(target), broken=True)
    for _ in range(3):
        model.apply_model(None, None)
    assert target.report()["struck_off"] == []
    assert target.report()["model_calls_repeated"] == 1


def test_a_lossy_kernel_of_cores_is_checked_by_the_model_call_too(host):
    """--use-sage-attention: core's own function is the lossy one."""
    good = [6]

    def attention_sage(*args, **kwargs):
        good[0] -= 1
        out = host.core.attention_pytorch(*args, **kwargs)
        return out if good[0] >= 0 else out * torch.nan

    target = override(host, fakes.backend("absent", missing="not installed"))
    target.dispatcher._check = lambda *args: None
    model = BaseModel(host, target, host.hooks.AttentionHooks(target))
    q, k, v = layouts(*fakes.qkv())[False]
    model._apply_model = lambda *args, **kwargs: target(attention_sage, q, k, v, 2, _inside_attn_wrapper=True)
    for _ in range(8):
        assert torch.isfinite(model.apply_model(None, None)).all()
    assert counts(target) == {"core": 7, "core_pytorch": 2}
    assert target.report()["model_calls_repeated"] == 1


def test_every_model_call_is_told_to_the_dispatcher(host, monkeypatch):
    """Which re-reads inference masks and compares one call of each shape."""
    target = override(host)
    model = BaseModel(host, target, host.hooks.AttentionHooks(target))
    mask = torch.zeros(1, 1, 8)
    looks = []
    monkeypatch.setattr(target.dispatcher, "begin_model_call", lambda: looks.append(mask))
    for _ in range(3):
        model.apply_model(None, None)
    assert len(looks) == 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_qwens_text_mask_is_looked_at_once_a_run_and_dropped_when_idle(host, idle, compiled):
    target = override(host)
    hooks = host.hooks.AttentionHooks(target)
    model = BaseModel(host, target, hooks, network="QwenImageTransformer2DModel")
    if compiled:
        model.diffusion_model = types.SimpleNamespace(_orig_mod=model.diffusion_model)
    text_mask = torch.ones(1, 7, dtype=torch.int64)
    text_mask[0, 0] = idle
    cond = {"uuid": "a", "model_conds": {"attention_mask": types.SimpleNamespace(cond=text_mask)}}
    guider = types.SimpleNamespace(conds={"positive": [cond]})

    def steps(*args, **kwargs):
        for _ in range(3):
            model.apply_model(None, None, transformer_options={"uuids": ["a"]}, attention_mask=text_mask)

    hooks.outer_sample(lambda: hooks.sampler_sample(steps, guider, torch.tensor([1.0, 0.5, 0.0])))
    assert len(model.masks) == 3
    assert all((mask is None) is idle for mask in model.masks)
    assert target.report()["text_masks_dropped"] == 3 * idle
    assert target.report()["masks_dropped"] == 0
    other = BaseModel(host, target, hooks, network="AnotherModel")
    other.apply_model(None, None, transformer_options={"uuids": ["a"]}, attention_mask=text_mask)
    assert other.masks[0] is text_mask


def sampled(host, schedule, sampler, sigmas=(1.0, 0.9, 0.7, 0.4, 0.2, 0.0), extra_options=None):
    """The sigmas of the model calls that a sampler of core's makes, and whether each was an exact one."""
    import comfy.k_diffusion.sampling as samplers

    target = override(host, schedule=schedule)
    hooks = host.hooks.AttentionHooks(target)
    made, reported = [], []

    def model(x, sigma, **kwargs):
        hooks.predict_noise(lambda *a, **k: made.append((round(float(sigma[0]), 3), target.exact_model_call)), x, sigma)
        return x * 0.9

    model.inner_model = types.SimpleNamespace(
        inner_model=types.SimpleNamespace(
            model_sampling=types.SimpleNamespace(percent_to_sigma=lambda p: 1e4 if p <= 0 else 0.0)
        ),
        model_patcher=types.SimpleNamespace(get_model_object=lambda name: model.inner_model.inner_model.model_sampling),
    )
    function = getattr(samplers, sampler)

    class Sampler:
        """Stands for core's KSAMPLER, which turns the sampler's reports into its callback."""

        sampler_function = staticmethod(function)

        def __init__(self):
            self.extra_options = extra_options or {}

        def sample(self, guider, sigmas, extra_args, callback, noise):
            def report(info):
                callback(info["i"], info["denoised"], info["x"], len(sigmas) - 1)

            return function(model, noise, sigmas, callback=report, disable=True, **self.extra_options)

    sampler = Sampler()
    chain = host.executor.new_class_executor(sampler.sample, sampler, [hooks.sampler_sample])
    guider = types.SimpleNamespace(conds={})
    hooks.outer_sample(
        lambda: chain.execute(
            guider, torch.tensor(sigmas), {}, lambda step, *a: reported.append(step), torch.ones(1, 1, 2, 2)
        )
    )
    assert reported == list(range(len(sigmas) - 1)), "the callback that was there is still called"
    assert target.exact_model_call is False
    return made


@pytest.mark.parametrize(
    ("sampler", "exact"),
    [
        ("sample_euler", [1, 0, 0, 1, 1]),
        ("sample_heun", [1, 1, 0, 0, 0, 0, 1, 1, 1]),
        ("sample_dpm_2", [1, 1, 0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_the_schedule_makes_the_right_model_calls_exact(host, sampler, exact):
    made = sampled(host, Schedule(first_steps=1, last_steps=2), sampler)
    assert [flag for _, flag in made] == [bool(flag) for flag in exact], made


def test_the_schedule_holds_with_added_noise_and_with_flipped_sigmas(host):
    made = sampled(host, Schedule(first_steps=1), "sample_euler", extra_options={"s_churn": 0.5})
    assert [sigma for sigma, _ in made][0] > 1, "s_churn lifts the sigma of each step"
    assert [flag for _, flag in made] == [True, False, False, False, False]
    made = sampled(host, Schedule(first_steps=1), "sample_euler", sigmas=(0.01, 0.2, 0.4, 0.7, 1.0))
    assert [flag for _, flag in made] == [True, False, False, False]


def test_the_samplers_that_call_ahead_exist_in_core(host):
    import comfy.k_diffusion.sampling as samplers

    assert all(hasattr(samplers, name) for name in CALLS_AHEAD)


def test_a_run_in_which_no_call_arrives_says_who_takes_them(host):
    q, k, v = layouts(*fakes.qkv())[False]

    def greedy(func, *args, **kwargs):
        return host.core.attention_pytorch(*args, **{**kwargs, "_inside_attn_wrapper": True})

    def sample(target, later=None):
        hooks = host.hooks.AttentionHooks(target)
        found = options(later or target)

        def run(*args, **kwargs):
            return host.core.attention_pytorch(q, k, v, 2, transformer_options=found)

        run.class_obj = types.SimpleNamespace(model_options={"transformer_options": found})
        hooks.outer_sample(run)
        return target.report()["notes"]

    (before,) = sample(override(host, previous=greedy))
    assert "greedy, on the model before this node, takes every attention call" in before
    (after,) = sample(override(host), later=greedy)
    assert "greedy, put on the model after this node, takes every attention call" in after
    assert sample(override(host)) == []
