"""ComfyUI's own attention beside the one that `auto` chose: who is the slower one here gives way, and nobody else."""

from __future__ import annotations

import time

import pytest
import torch

from lowbit.attention.dispatch import CHECKED_CALLS, Dispatcher
from lowbit.attention.plan import Policy
from lowbit.attention.report import TIMED_CALLS
from lowbit.attention.trial import TIMED_CALLS as OWN_CALLS
from lowbit.attention.trial import WARM_CALLS

from . import fakes

SETTLED = CHECKED_CALLS + TIMED_CALLS
TRIED = SETTLED + WARM_CALLS + OWN_CALLS
report, counts = fakes.report, fakes.counts


class SlowCore(fakes.Core):
    """ComfyUI's own attention, taking that many seconds."""

    def __init__(self, *arguments, seconds):
        super().__init__(*arguments)
        self.seconds = seconds

    def __call__(self, drop_mask):
        time.sleep(self.seconds)
        return super().__call__(drop_mask)


def dispatcher(*backends, policy=None):
    """One that tries its choice on the CPU."""
    ranks = fakes.rank(*(b.name for b in backends), budget=None)
    return Dispatcher(policy or Policy("auto", "fast"), backends=backends, ranks=ranks, tried_on=("cpu",))


def run(target, core, times=1):
    q, k, v, mask, scale = core.arguments
    for _ in range(times):
        out = target.run(q, k, v, mask, scale, False, core)
    return out


def slow(seconds):
    def kernel(q, k, v, mask, scale):
        time.sleep(seconds)
        return fakes.attend(q, k, v, mask, scale)

    return kernel


def tried(*backends, policy=None):
    """A dispatcher after as many calls as a trial takes, and the core that it had."""
    target = dispatcher(*backends, policy=policy)
    target.begin_model_call()
    core = fakes.Core(*fakes.qkv())
    want = run(target, core)
    for _ in range(TRIED):
        assert torch.equal(run(target, core), want), "the trial's output is for nobody"
    return target, core


def test_a_backend_that_comfyui_outruns_here_is_struck_off():
    """The table was measured on other shapes. The next backend takes over, and is tried in its turn."""
    target, core = tried(fakes.backend("slow", slow(0.02)), fakes.backend("slow, too", slow(0.02)))
    assert core.calls == WARM_CALLS + OWN_CALLS
    assert counts(target) == {"slow": TRIED + 1}
    target.begin_model_call()
    run(target, core, times=TRIED)
    assert core.calls == 2 * (WARM_CALLS + OWN_CALLS)
    target.begin_model_call()
    run(target, core)
    assert [(s["backend"], s["reason"][:7]) for s in report(target)["struck_off"]] == [
        ("slow", "it took"),
        ("slow, too", "it took"),
    ]
    assert counts(target)["core"] == 1


def test_one_model_call_a_prompt_is_enough_for_a_verdict():
    """A prompt of one step: the report's times start anew with the next one, the trial's do not."""
    target, core = tried(fakes.backend("slow", slow(0.02)))
    target.report.clear()
    target.begin_run()
    target.begin_model_call()
    run(target, core)
    assert counts(target) == {"core": 1}


def test_a_call_that_was_held_up_is_no_reason():
    """The report's times are of other calls than the trial's: one of a later prompt may be long."""
    held_up = []

    def kernel(q, k, v, mask, scale):
        time.sleep(held_up.pop() if held_up else 0.0)
        return fakes.attend(q, k, v, mask, scale)

    target = dispatcher(fakes.backend("good", kernel))
    core = SlowCore(*fakes.qkv(), seconds=0.01)
    target.begin_model_call()
    run(target, core, times=SETTLED + WARM_CALLS + 1)
    held_up.append(0.05)
    run(target, core, times=OWN_CALLS)
    target.report.clear()
    for _ in range(2):
        target.begin_model_call()
        run(target, core)
    assert report(target)["struck_off"] == []


def test_two_masks_of_one_kind_are_tried_apart():
    """They share a line of the report, not a verdict."""
    delays = {1: 0.01, 2: 0.0}

    def kernel(q, k, v, mask, scale):
        time.sleep(delays[mask.shape[1]])
        return fakes.attend(q, k, v, mask, scale)

    target = dispatcher(fakes.backend("good", kernel))
    q, k, v = fakes.qkv()
    masks = ((1, 0.02), (2, 0.003))
    cores = [SlowCore(q, k, v, torch.randn(1, heads, 9, 11), seconds=seconds) for heads, seconds in masks]
    for _ in range(3):
        target.begin_model_call()
        for core in cores:
            run(target, core, times=TRIED)
    assert report(target)["struck_off"] == []


def test_a_faster_backend_stays_and_is_not_tried_again():
    target = dispatcher(fakes.backend("good"))
    core = SlowCore(*fakes.qkv(), seconds=0.02)
    for _ in range(3):
        target.begin_model_call()
        run(target, core, times=SETTLED + 5)
    assert core.calls == WARM_CALLS + OWN_CALLS
    assert counts(target) == {"good": 3 * (SETTLED + 5)}
    assert report(target)["struck_off"] == []


@pytest.mark.parametrize("policy", [Policy("slow", "fast"), Policy("measured", "fast")])
def test_what_was_asked_for_or_timed_is_not_tried(policy):
    target, core = tried(fakes.backend("slow", slow(0.002)), policy=policy)
    assert all(plan.trial is None for plan in target._plans.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("xformers: Invalid shape")])
def test_comfyui_failing_in_a_trial_costs_the_backend_nothing(error):
    target = dispatcher(fakes.backend("good"))

    class Failing(fakes.Core):
        def __call__(self, drop_mask):
            self.calls += 1
            raise error

    core = Failing(*fakes.qkv())
    target.begin_model_call()
    run(target, core, times=SETTLED + 5)
    target.begin_model_call()
    run(target, core)
    assert core.calls == 1
    assert counts(target) == {"good": SETTLED + 6}
    assert report(target)["struck_off"] == []
