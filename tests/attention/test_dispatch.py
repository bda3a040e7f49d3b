"""The dispatcher: the right backend for each call, every wrong one caught, cheap once warm."""

from __future__ import annotations

import itertools
import logging
import time

import pytest
import torch

from lowbit.attention.backends import BACKENDS, CORE
from lowbit.attention.candidates import AttentionInputs, Policy, ShapePlan
from lowbit.attention.dispatch import CHECKED_CALLS, Dispatcher
from lowbit.attention.planning import check_named
from lowbit.attention.report import TIMED_CALLS, Struck, as_text
from lowbit.errors import CapabilityError

from . import fakes

SETTLED = CHECKED_CALLS + TIMED_CALLS


def run(target, q, k, v, mask=None, scale=None, exact=False, heads_first=False, times=1, core=None):
    core = core or fakes.Core(q, k, v, mask, scale, heads_first)
    for _ in range(times):
        out = target.run(AttentionInputs(q, k, v, mask, scale, exact, core, heads_first))
    return out


dispatcher, report, counts = fakes.dispatcher, fakes.report, fakes.counts


def nan(q, k, v, mask, scale):
    out = fakes.attend(q, k, v, mask, scale)
    out[..., 0, 0] = torch.nan
    return out


def overflow(q, k, v, mask, scale):
    return torch.full_like(q, torch.inf)


def raising(q, k, v, mask, scale):
    raise RuntimeError("CUDA error: misaligned address\nmore lines")


def wrong_shape(q, k, v, mask, scale):
    return fakes.attend(q, k, v, mask, scale)[:, :, :-1]


def wrong_dtype(q, k, v, mask, scale):
    return fakes.attend(q, k, v, mask, scale).double()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("mask", [None, "2d", "3d", "4d", "bool"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_kind_of_call_equals_float64(heads_first, scale, mask, kv_heads):
    q, k, v = fakes.qkv(batch=2, heads=4, kv_heads=kv_heads)
    shapes = {"2d": (9, 11), "3d": (2, 1, 11), "4d": (2, 1, 9, 11)}
    if mask == "bool":
        mask = torch.rand(2, 1, 1, 11) < 0.7
        mask[..., 0] = True
    elif mask is not None:
        mask = torch.randn(shapes[mask])
    target = dispatcher(fakes.backend())
    want = fakes.reference(q, k, v, mask, scale)
    for _ in range(SETTLED + 2):
        out = run(target, q, k, v, mask, scale, heads_first=heads_first)
        if heads_first:
            assert out.shape == (2, 4, 9, 16)
            out = out.transpose(1, 2).flatten(2)
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    assert counts(target) == {"fake": SETTLED + 2}


@pytest.mark.parametrize("fault", [nan, overflow, raising, wrong_shape, wrong_dtype, fakes.noisy])
def test_a_wrong_backend_is_struck_off_and_the_call_done_again(fault, caplog):
    bad = fakes.backend("bad", fault, error_class="fast")
    target = dispatcher(bad, fakes.backend("good"))
    q, k, v = fakes.qkv()
    want = fakes.reference(q, k, v)
    with caplog.at_level(logging.WARNING):
        for _ in range(SETTLED + 3):
            torch.testing.assert_close(run(target, q, k, v).double(), want, rtol=1e-4, atol=1e-5)
    assert counts(target) == {"good": SETTLED + 3}
    (struck,) = report(target)["struck_off"]
    assert struck["backend"] == "bad"
    assert "bad" in as_text(report(target))
    assert sum("bad is struck off" in record.message for record in caplog.records) == 1
    other = fakes.qkv(q_len=5)
    run(target, *other)
    assert sum("bad is struck off" in record.message for record in caplog.records) == 1, "told once, not per shape"


def test_a_struck_backend_is_struck_for_its_shape_alone():
    def only_short(q, k, v, mask, scale):
        return fakes.attend(q, k, v, mask, scale) * (torch.nan if q.shape[2] > 8 else 1)

    target = dispatcher(fakes.backend("picky", only_short), fakes.backend("good"))
    run(target, *fakes.qkv(q_len=9), times=3)
    run(target, *fakes.qkv(q_len=4), times=3)
    assert counts(target) == {"good": 3, "picky": 3}


@pytest.mark.parametrize("fault", [raising, wrong_shape])
def test_a_backend_that_goes_wrong_later_is_caught_too(fault):
    calls = itertools.count()

    def late(q, k, v, mask, scale):
        return (fakes.attend if next(calls) < SETTLED + 4 else fault)(q, k, v, mask, scale)

    target = dispatcher(fakes.backend("late", late), fakes.backend("good"))
    q, k, v = fakes.qkv()
    for _ in range(SETTLED + 8):
        torch.testing.assert_close(run(target, q, k, v).double(), fakes.reference(q, k, v), rtol=1e-4, atol=1e-5)
    assert counts(target) == {"late": SETTLED + 4, "good": 4}


def test_when_every_backend_fails_the_last_resort_answers():
    target = dispatcher(fakes.backend("one", nan), fakes.backend("two", raising))
    q, k, v = fakes.qkv()
    core = fakes.Core(q, k, v)
    run(target, q, k, v, core=core, times=3)
    assert core.calls == 3
    assert counts(target) == {CORE: 3}


def test_nan_in_the_inputs_is_not_the_backends_fault():
    q, k, v = fakes.qkv()
    v[0, 0, 0, 0] = torch.nan
    target = dispatcher(fakes.backend())
    run(target, q, k, v, times=SETTLED)
    assert counts(target) == {"fake": SETTLED}
    assert report(target)["struck_off"] == []


def test_rows_that_the_mask_empties_are_nobodys_fault():
    q, k, v = fakes.qkv()
    mask = torch.zeros(1, 1, 9, 11)
    mask[:, :, 3] = -torch.inf
    target = dispatcher(fakes.backend("good", lambda q, k, v, m, s: torch.softmax(q @ k.mT + m, -1) @ v))
    core = fakes.Core(q, k, v, mask)
    core_out = torch.full((1, 9, 32), torch.nan)
    out = target.run(AttentionInputs(q, k, v, mask, None, False, lambda drop: core_out))
    assert out is core_out
    target.run(AttentionInputs(q, k, v, mask, None, False, core))
    assert counts(target) == {CORE: 1, "good": 1}
    assert report(target)["struck_off"] == []


def test_out_of_memory_is_forgiven_at_the_next_run():
    full = [True]

    def hungry(q, k, v, mask, scale):
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fakes.attend(q, k, v, mask, scale)

    target = dispatcher(fakes.backend("hungry", hungry), fakes.backend("good"))
    target.begin_run()
    run(target, *fakes.qkv(), times=2)
    assert counts(target) == {"good": 2}
    full[0] = False
    run(target, *fakes.qkv())
    assert counts(target) == {"good": 3}
    target.begin_run()
    run(target, *fakes.qkv())
    assert counts(target) == {"good": 3, "hungry": 1}


def test_an_exact_call_never_meets_a_lossy_backend():
    lossy = fakes.Recorder()
    target = dispatcher(fakes.backend("lossy", lossy, error_class="fast"), fakes.backend("exact"))
    run(target, *fakes.qkv(), exact=True, times=4)
    assert not lossy.calls
    named = dispatcher(
        fakes.backend("lossy", lossy, error_class="fast"), fakes.backend("exact"), policy=Policy("lossy", "fast")
    )
    run(named, *fakes.qkv(), exact=True, times=4)
    assert not lossy.calls
    run(named, *fakes.qkv(), times=4)
    assert len(lossy.calls) == 4


@pytest.mark.parametrize(("budget", "taken"), [("exact", "exact"), ("balanced", "balanced"), ("fast", "fast")])
def test_a_budget_admits_its_own_class_and_better(budget, taken):
    table = [fakes.backend(name, error_class=name) for name in ("unbounded", "fast", "balanced", "exact")]
    target = dispatcher(*table, policy=Policy("auto", budget))
    run(target, *fakes.qkv())
    assert counts(target) == {taken: 1}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mask_heads", "checked"), [(40, 40, 1, 4), (40, 8, 1, 40), (40, 40, 40, 40)]
)
def test_the_error_check_costs_a_few_heads_where_it_can(heads, kv_heads, mask_heads, checked):
    exact = fakes.Recorder()
    target = dispatcher(fakes.backend("lossy", error_class="fast"), fakes.backend("exact", exact))
    run(target, *fakes.qkv(heads=heads, kv_heads=kv_heads), mask=torch.randn(1, mask_heads, 9, 11), times=SETTLED)
    assert [recorded[0].shape[1] for recorded in exact.calls] == [checked] * CHECKED_CALLS
    assert report(target)["calls"][0]["error"] < 1e-5


def test_a_reference_that_refuses_a_view_of_some_heads_is_asked_with_all():
    def whole(q, k, v, mask, scale):
        if q.shape[1] != 40:
            raise RuntimeError("no execution plan for these strides")
        return fakes.attend(q, k, v, mask, scale)

    target = dispatcher(fakes.backend("lossy", fakes.noisy, error_class="fast"), fakes.backend("exact", whole))
    run(target, *fakes.qkv(heads=40), times=3)
    assert counts(target) == {"exact": 3}


def test_a_backend_asked_for_by_name_is_not_held_to_the_budget():
    target = dispatcher(
        fakes.backend("mine", fakes.noisy, error_class="unbounded"),
        fakes.backend("exact"),
        policy=Policy("mine", "exact"),
    )
    run(target, *fakes.qkv(), times=3)
    assert counts(target) == {"mine": 3}
    assert report(target)["calls"][0]["error"] > 0.1


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(
    ("limits", "call", "says"),
    [
        ({"missing": "not installed"}, {}, "not installed; pip install mine"),
        ({"only_head_dims": (64, 128)}, {"head_dim": 16}, "head dim 16"),
        ({"dtypes": (torch.bfloat16,)}, {}, "takes bfloat16, not float32"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why_and_stops_or_falls_back(limits, call, says, stop):
    target = dispatcher(
        fakes.backend("mine", **limits), fakes.backend("good"), policy=Policy("mine", "fast", stop=stop)
    )
    q, k, v = fakes.qkv(**call)
    if stop:
        with pytest.raises(CapabilityError, match=says):
            run(target, q, k, v)
        return
    torch.testing.assert_close(run(target, q, k, v).double(), fakes.reference(q, k, v), rtol=1e-4, atol=1e-5)
    assert counts(target) == {"good": 1}
    assert says in report(target)["declined"][0]["reason"]


def test_stop_does_not_stop_at_a_call_that_merely_has_a_mask():
    target = dispatcher(
        fakes.backend("mine", masks=()), fakes.backend("good"), policy=Policy("mine", "fast", stop=True)
    )
    run(target, *fakes.qkv(), mask=torch.randn(9, 11))
    run(target, *fakes.qkv())
    assert counts(target) == {"good": 1, "mine": 1}


def test_check_named_gives_the_one_sentence():
    missing = check_named(Policy("sageattn_3_fp4"), fakes.CPU)
    assert missing == (
        "The attention backend sageattn_3_fp4 cannot run: it needs an NVIDIA GPU. Choose another one, or let it fall back."
    )
    assert "this GPU is cc 9.0, it needs 10.0 or 12.0-12.1" in check_named(Policy("sageattn_3_fp4"), fakes.HOPPER)
    with pytest.raises(CapabilityError, match="needs an NVIDIA GPU"):
        check_named(Policy("cudnn", stop=True), fakes.CPU)
    with pytest.raises(CapabilityError, match="no attention backend sagettn"):
        check_named(Policy("sagettn"), fakes.CPU)
    assert check_named(Policy("auto", stop=True), fakes.CPU) is None


def test_odd_inputs_go_to_the_last_resort_untouched():
    target = dispatcher(fakes.backend())
    q, k, v = fakes.qkv()
    sentinel = torch.zeros(1)
    for arguments in (
        (q, k.double(), v),
        (q, k, v[:, :, :-1]),
        (q.requires_grad_(), k, v),
        (fakes.qkv(batch=3)[0], k, v),
    ):
        taken = []
        out = target.run(
            AttentionInputs(*arguments, None, None, False, lambda drop, taken=taken: taken.append(drop) or sentinel)
        )
        assert out is sentinel
        assert taken == [False]


def test_a_mask_that_masks_nothing_is_dropped_and_read_once():
    recorder = fakes.Recorder()
    target = dispatcher(fakes.backend("nomask", recorder, masks=()))
    target.begin_run()
    q, k, v = fakes.qkv()
    mask = torch.zeros(1, 1, 11)
    for _ in range(20):
        run(target, q, k, v, mask)
    assert counts(target) == {"nomask": 20}
    assert target.masks.checks == 1
    assert report(target)["masks_dropped"] == 20
    target.end_run()
    target.begin_run()
    run(target, q, k, v, mask)
    assert target.masks.checks == 1, "one look in the new run"


def test_what_was_never_run_on_this_gpu_says_so():
    blackwell = fakes.Environment("cuda", (12, 0), "a Blackwell GPU", (13, 0))
    for tested, notes in (((), 1), (("12.0",), 0)):
        target = dispatcher(fakes.backend("new", tested_on=tested), environment=lambda device: blackwell)
        run(target, *fakes.qkv(), times=3)
        assert report(target)["notes"] == ["new: not run by us on cc 12.0."] * notes


def test_barred_backends_stay_out_until_taken_back():
    target = dispatcher(fakes.backend("lossy", error_class="fast"), fakes.backend("good"))
    q, k, v = fakes.qkv()
    run(target, q, k, v, times=2)
    assert target.bar_lossy("the output was not finite") == ["lossy"]
    run(target, q, k, v)
    run(target, *fakes.qkv(q_len=4))
    assert counts(target) == {"lossy": 2, "good": 2}
    target.unbar(["lossy"])
    run(target, q, k, v)
    assert counts(target) == {"lossy": 3, "good": 2}


def test_a_warm_call_costs_less_than_15_microseconds_of_python():
    """In the thread's own time, each round beside a loop that says how fast this machine runs Python right then."""
    q, k, v = fakes.qkv(heads=1, q_len=1, kv_len=1, head_dim=16)
    ready = fakes.attend(q, k, v)
    target = dispatcher(fakes.backend("instant", lambda q, k, v, mask, scale: ready))
    core = fakes.Core(q, k, v)
    run(target, q, k, v, core=core, times=SETTLED + 1)
    rounds, calls = [], 2000
    for _ in range(15):
        slowness = fakes.slowness(1)
        start = time.thread_time()
        for _ in range(calls):
            target.run(AttentionInputs(q, k, v, None, None, False, core))
        rounds.append((time.thread_time() - start) / calls * 1e6 / slowness)
    assert min(rounds) < 15, f"{min(rounds):.1f} us a call"


def test_the_table_of_backends_is_whole():
    names = [backend.name for backend in BACKENDS]
    assert len(set(names)) == len(names)
    assert {"sageattn_3_fp4", "sageattn_3_fp8", "sageattn_3", "sageattn"} <= set(names)
    assert {"comfy_kitchen_int8", "flash", "cudnn", "sdpa"} <= set(names)


@pytest.mark.parametrize("method", ["begin_run", "begin_model_call", "bar_lossy", "unbar"])
def test_another_thread_may_plan_while_plans_are_walked(method, monkeypatch):
    """A worker of multi-GPU sampling meets a new shape while the main one begins a step: no 'changed size'."""
    target = dispatcher(fakes.backend("lossy", error_class="fast"))
    for length in (16, 32, 48):
        run(target, *fakes.qkv(q_len=length), times=SETTLED)
    if method == "unbar":
        target.bar_lossy("a test")
    if method == "begin_run":
        for plan in target._plans.values():
            plan.candidates[0].struck = Struck("lossy", plan.call, "memory", True)
    plans = target._plans

    def inserting(call):
        def inserts(*args, **kwargs):
            plans[("another shape", len(plans))] = next(iter(plans.values()))
            return call(*args, **kwargs)

        return inserts

    for owner, name in ((ShapePlan, "advance"), (Dispatcher, "_known")):
        monkeypatch.setattr(owner, name, inserting(getattr(owner, name)))
    before = len(plans)
    {
        "begin_run": target.begin_run,
        "begin_model_call": target.begin_model_call,
        "bar_lossy": lambda: target.bar_lossy("a test"),
        "unbar": lambda: target.unbar(["lossy"]),
    }[method]()
    assert len(plans) > before


@pytest.mark.parametrize("as_they_are", [False, True])
def test_nothing_is_copied_for_a_backend_that_takes_any_strides(as_they_are):
    recorder = fakes.Recorder()
    target = dispatcher(fakes.backend("ours", recorder, as_they_are=as_they_are))
    q, k, v = fakes.qkv()
    k, v = (x[:, :1].expand_as(x) for x in (k, v))
    run(target, q, k, v, times=SETTLED + 1)
    assert {call[1].data_ptr() == k.data_ptr() for call in recorder.calls} == {as_they_are}
    assert {call[1].stride(1) == 0 for call in recorder.calls} == {as_they_are}
