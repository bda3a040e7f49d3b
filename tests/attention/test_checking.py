"""What is looked at while a model runs: every block once, one call of each model call after, and what cannot be judged."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from lowbit.attention import dispatch
from lowbit.attention.backends import CORE
from lowbit.attention.candidates import AttentionInputs, Policy
from lowbit.attention.dispatch import CHECKED_CALLS, COMPARED_EVERY, UNJUDGED_CALLS
from lowbit.attention.report import TIMED_CALLS, Report, Struck, as_text

from . import fakes

SETTLED = CHECKED_CALLS + TIMED_CALLS
BLOCKS = 12


dispatcher, report, counts = fakes.dispatcher, fakes.report, fakes.counts


class Lossy:
    """An attention that errs by `error` in the calls whose number `wrong` says."""

    def __init__(self, wrong, error=0.5):
        self.wrong, self.error = wrong, error
        self.numbers = itertools.count()

    def __call__(self, q, k, v, mask, scale):
        out = fakes.attend(q, k, v, mask, scale)
        return out + self.error * out.std() * torch.randn_like(out) if self.wrong(next(self.numbers)) else out


def model_calls(target, count, blocks=BLOCKS, tensors=None):
    q, k, v = tensors or fakes.qkv()
    for _ in range(count):
        target.begin_model_call()
        for _ in range(blocks):
            target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))


@pytest.mark.parametrize("block", [0, 3, 7, BLOCKS - 1])
def test_every_block_is_compared_in_the_first_model_call(block):
    lossy = fakes.backend("lossy", Lossy(lambda n: n == block), error_class="fast")
    target = dispatcher(lossy, fakes.backend("right"))
    model_calls(target, 1)
    assert counts(target) == {key: n for key, n in (("lossy", block), ("right", BLOCKS - block)) if n}
    assert "over the budget" in report(target)["struck_off"][0]["reason"]


def test_later_model_calls_compare_one_call_each_in_changing_blocks():
    exact = fakes.Recorder()
    target = dispatcher(fakes.backend("lossy", error_class="fast"), fakes.backend("right", exact))
    model_calls(target, 1)
    assert len(exact.calls) == BLOCKS
    exact.calls.clear()
    calls_before = []
    for _ in range(2 * BLOCKS):
        target.begin_model_call()
        before = len(exact.calls)
        for block in range(BLOCKS):
            q, k, v = fakes.qkv()
            target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))
            if len(exact.calls) > before:
                calls_before.append(block)
                before = len(exact.calls)
    assert len(calls_before) == 2 * BLOCKS, "one a model call"
    assert len(set(calls_before)) == BLOCKS, "every block has its turn"
    assert counts(target) == {"lossy": (2 * BLOCKS + 1) * BLOCKS}


def test_an_error_that_starts_in_a_later_step_is_noticed_within_a_step():
    lossy = fakes.backend("lossy", Lossy(lambda n: n >= 3 * BLOCKS), error_class="fast")
    target = dispatcher(lossy, fakes.backend("right"))
    model_calls(target, 3)
    assert counts(target) == {"lossy": 3 * BLOCKS}
    model_calls(target, 1)
    assert counts(target)["right"] > 0
    assert report(target)["struck_off"][0]["backend"] == "lossy"


@pytest.mark.parametrize("call", range(6))
def test_a_shape_with_one_call_a_model_call_is_compared_from_the_first_on(call):
    lossy = fakes.backend("lossy", Lossy(lambda n: n == call), error_class="fast")
    target = dispatcher(lossy, fakes.backend("right"))
    model_calls(target, call + 1, blocks=1)
    assert counts(target) == {key: n for key, n in (("lossy", call), ("right", 1)) if n}


def test_without_model_calls_a_few_are_compared_now_and_then():
    lossy = fakes.backend("lossy", Lossy(lambda n: n > SETTLED), error_class="fast")
    target = dispatcher(lossy, fakes.backend("right"))
    q, k, v = fakes.qkv()
    for _ in range(SETTLED + COMPARED_EVERY + 1):
        target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))
    assert counts(target)["right"] > 0


def test_a_backend_asked_for_by_name_is_not_compared_in_every_block():
    exact = fakes.Recorder()
    target = dispatcher(
        fakes.backend("mine", error_class="fast"), fakes.backend("right", exact), policy=Policy("mine", "fast")
    )
    model_calls(target, 1)
    assert len(exact.calls) == CHECKED_CALLS


def nan_reference(q, k, v, mask, scale):
    return fakes.attend(q, k, v, mask, scale) * torch.nan


def test_a_reference_that_is_not_finite_is_not_believed_and_the_next_is_asked():
    wrong = fakes.backend("lossy", Lossy(lambda n: True), error_class="fast")
    target = dispatcher(wrong, fakes.backend("broken", nan_reference), fakes.backend("right"))
    model_calls(target, 1, 4)
    assert counts(target) == {"right": 4}
    assert {item["backend"] for item in report(target)["struck_off"]} == {"lossy", "broken"}


def test_a_right_backend_is_not_blamed_for_a_broken_reference():
    target = dispatcher(
        fakes.backend("lossy", error_class="fast"), fakes.backend("broken", nan_reference), fakes.backend("right")
    )
    model_calls(target, 1, 4)
    assert counts(target) == {"lossy": 4}
    assert report(target)["calls"][0]["error"] < 1e-5


def test_where_no_reference_is_finite_nothing_is_claimed_and_the_report_is_json():
    target = dispatcher(fakes.backend("lossy", error_class="fast"), fakes.backend("broken", nan_reference))
    model_calls(target, 1, 3)
    found = report(target)
    assert counts(target) == {"lossy": 3}
    assert found["calls"][0]["error"] is None
    json.dumps(found, allow_nan=False)
    (tally,) = (t for t in target.report.tallies.values() if t.calls)
    tally.error = torch.inf
    assert "Infinity" not in json.dumps(report(target), allow_nan=False)


def test_an_error_that_is_no_number_is_over_every_budget(monkeypatch):
    monkeypatch.setattr(dispatch.checks, "relative_error", lambda out, want: float("nan"))
    target = dispatcher(fakes.backend("lossy", error_class="fast"), fakes.backend("right"))
    model_calls(target, 1, 1)
    assert counts(target) == {"right": 1}


def test_inputs_that_are_not_finite_do_not_count_as_a_check():
    q, k, v = fakes.qkv()
    bad = v.clone()
    bad[0, 0, 0, 0] = torch.nan
    target = dispatcher(fakes.backend("lossy", Lossy(lambda n: True), error_class="fast"), fakes.backend("right"))
    for _ in range(SETTLED):
        target.run(AttentionInputs(q, k, bad, None, None, False, fakes.Core(q, k, bad)))
    assert counts(target) == {"lossy": SETTLED}
    target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))
    assert counts(target) == {"lossy": SETTLED, "right": 1}


def test_inputs_that_are_never_finite_are_looked_at_a_limited_number_of_times(monkeypatch):
    q, k, v = fakes.qkv()
    v[0, 0, 0, 0] = torch.nan
    looks = []
    is_finite = dispatch.checks.is_finite
    monkeypatch.setattr(dispatch.checks, "is_finite", lambda x: looks.append(1) or is_finite(x))
    target = dispatcher(fakes.backend())
    for _ in range(UNJUDGED_CALLS):
        target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))
    before = len(looks)
    assert before
    for _ in range(20):
        target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v)))
    assert len(looks) == before


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_calls_that_need_gradients_go_to_core_whatever_came_before(which, warm):
    """The training nodes: the plan of the shape may be there already from sampling."""
    target = dispatcher(
        fakes.backend("no_gradients", lambda q, k, v, m, s: fakes.attend(q.detach(), k.detach(), v.detach(), m, s))
    )
    tensors = fakes.qkv()
    for _ in range(SETTLED + 1 if warm else 0):
        target.run(AttentionInputs(*tensors, None, None, False, fakes.Core(*tensors)))
    tensors[which].requires_grad_()
    out = target.run(AttentionInputs(*tensors, None, None, False, fakes.Core(*tensors)))
    out.sum().backward()
    assert tensors[which].grad is not None
    assert report(target)["unhandled"] == [{"reason": dispatch.GRADIENTS, "calls": 1}]
    with torch.no_grad():
        target.run(AttentionInputs(*tensors, None, None, False, fakes.Core(*tensors)))
    assert counts(target)["no_gradients"] == (SETTLED + 2 if warm else 1)


def test_plans_and_the_list_of_what_was_struck_stay_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    target = dispatcher(fakes.backend())
    for q_len in range(1, 9):
        tensors = fakes.qkv(q_len=q_len)
        target.run(AttentionInputs(*tensors, None, None, False, fakes.Core(*tensors)))
    target.report.clear()
    target.begin_run()
    assert not target._plans
    assert not target.report.tallies
    tensors = fakes.qkv(q_len=3)
    target.run(AttentionInputs(*tensors, None, None, False, fakes.Core(*tensors)))
    assert counts(target) == {"fake": 1}
    found = Report()
    (tally, *_) = target.report.tallies.values()
    struck = Struck("a", tally.call, "it ran out of memory", temporary=True)
    for _ in range(3):
        found.strike(struck)
    assert found.struck == [struck]


def test_times_of_these_calls_and_earlier_ones_are_told_apart():
    target = dispatcher(fakes.backend())
    model_calls(target, 1)
    assert report(target)["calls"][0]["ms_from"] == "these calls"
    target.report.clear()
    assert report(target)["calls"] == []
    model_calls(target, 1)
    row = report(target)["calls"][0]
    assert row["ms_from"] == "earlier"
    assert row["ms_per_call"] > 0
    assert "ms when timed earlier" in as_text(report(target))


def test_running_out_of_memory_stays_in_the_report_of_its_prompt():
    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    target = dispatcher(fakes.backend("hungry", hungry), fakes.backend("good"))
    target.begin_run()
    model_calls(target, 1, 2)
    target.begin_run()
    assert [item["reason"] for item in report(target)["struck_off"]] == ["it ran out of memory"]
    target.report.clear()
    assert report(target)["struck_off"] == []
    assert CORE not in counts(target)
