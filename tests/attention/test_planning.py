"""Plans: which order timing gives and what it costs, what a failing candidate does to it, paired backends."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lowbit.attention import measure, planning
from lowbit.attention.backends import CORE, CORE_EXACT
from lowbit.attention.candidates import AttentionInputs, Policy
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.planning import TIMINGS_FILE
from lowbit.attention.report import as_text
from lowbit.kernels.measured import MeasuredNumbers

from . import fakes

CPU = torch.device("cpu")
# A GPU as the table sees it; the tensors stay on the CPU.
GPU = fakes.Environment("cuda", (8, 6), "an Ampere GPU", (12, 8))


class Clock:
    """Stands for the time module: only what sleeps takes time, however busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


clock = Clock()


@pytest.fixture(autouse=True)
def _nothing_else_takes_time(monkeypatch):
    monkeypatch.setattr(measure, "time", clock)


def dispatcher(*backends, policy=None, environment=GPU, **options):
    return Dispatcher(
        policy or Policy("auto", "fast"), backends=backends, environment=lambda device: environment, **options
    )


report, counts = fakes.report, fakes.counts


def slow(kernel, seconds=0.02):
    def call(*arguments):
        clock.sleep(seconds)
        return kernel(*arguments)

    return call


def raising(*arguments):
    raise RuntimeError("no kernel image")


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


def run(target, tensors=None, core=None, times=1, **options):
    q, k, v = tensors or fakes.qkv()
    for _ in range(times):
        out = target.run(
            AttentionInputs(q, k, v, None, None, options.pop("exact", False), core or fakes.Core(q, k, v), **options)
        )
    return out


def slow_core(seconds=0.02):
    return slow(fakes.Core(*fakes.qkv()), seconds)


def test_auto_takes_the_fastest_and_remembers_it(tmp_path):
    def build():
        return dispatcher(
            fakes.backend("slow", slow(fakes.attend)),
            fakes.backend("quick"),
            fakes.backend("wrong", fakes.noisy, error_class="fast"),
            timings=MeasuredNumbers(tmp_path, TIMINGS_FILE),
        )

    target = build()
    run(target, core=slow_core(), times=4)
    assert counts(target) == {"quick": 4}
    calls = []
    again = build()
    run(again, core=lambda drop: calls.append(drop) or slow_core()(drop))
    assert counts(again) == {"quick": 1}
    assert not calls, "the shape is known from the file: nothing is timed again"
    row = report(again)["calls"][0]
    assert row["ms_per_call"] is not None
    assert row["ms_from"] == "earlier"


@pytest.mark.parametrize("error", [RuntimeError("core is broken"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_core_that_cannot_be_timed_neither_ends_the_prompt_nor_the_next(tmp_path, error):
    def failing_core(drop):
        raise error

    for session in range(2):
        target = dispatcher(fakes.backend("good"), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE))
        run(target, core=failing_core if session == 0 else slow_core())
        assert counts(target) == {"good": 1}
        assert (tmp_path / TIMINGS_FILE).exists() is (session == 1), "only a complete timing is kept"


def test_a_file_without_cores_time_is_not_believed(tmp_path):
    def build():
        return dispatcher(fakes.backend("slow", slow(fakes.attend)), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE))

    run(build())
    content = json.loads((tmp_path / TIMINGS_FILE).read_text())
    for entries in content["measured"].values():
        for entry in entries.values():
            del entry[CORE]
    (tmp_path / TIMINGS_FILE).write_text(json.dumps(content))
    target = build()
    run(target)
    assert counts(target) == {CORE: 1}, "core is the faster one, which the damaged file does not say"


@pytest.mark.parametrize(("fault", "says"), [(raising, "no kernel image"), (out_of_memory, "ran out of memory")])
@pytest.mark.parametrize("good_calls", [0, 1, 2])
def test_a_candidate_that_fails_in_any_round_is_struck_off_and_listed(fault, says, good_calls, tmp_path):
    calls = []

    def hungry(*arguments):
        calls.append(1)
        return (fakes.attend if len(calls) <= good_calls else fault)(*arguments)

    target = dispatcher(
        fakes.backend("hungry", hungry), fakes.backend("good"), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE)
    )
    run(target, core=slow_core(), times=3)
    assert counts(target) == {"good": 3}
    (struck,) = report(target)["struck_off"]
    assert struck["backend"] == "hungry"
    assert says in struck["reason"]
    assert "while it was timed" in as_text(report(target))
    assert not (tmp_path / TIMINGS_FILE).exists()
    assert len(calls) == good_calls + 1


def test_timing_stops_early_when_calls_take_seconds(monkeypatch):
    monkeypatch.setattr(measure, "_once", lambda call, device, repeats: call() or 3000.0)
    calls = []
    times, failed = measure.milliseconds({"a": lambda: calls.append(1)}, CPU)
    assert times == {"a": 3000.0}
    assert not failed
    assert len(calls) == 3, "once to warm up, twice for the clock"


def test_one_stall_of_the_host_decides_nothing_between_long_calls(monkeypatch):
    taken = {"fast": iter([400.0, 900.0, 250.0, 250.0, 250.0]), "slow": iter([300.0] * 5)}
    monkeypatch.setattr(measure, "_once", lambda call, device, repeats: next(taken[call()]))
    times, _ = measure.milliseconds({name: lambda name=name: name for name in taken}, CPU)
    assert times["fast"] < times["slow"]


def test_nothing_is_timed_where_only_core_can_run(tmp_path):
    core = fakes.Core(*fakes.qkv())
    target = dispatcher(
        fakes.backend("absent", missing="not installed"), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE)
    )
    run(target, core=core)
    assert core.calls == 1
    assert not (tmp_path / TIMINGS_FILE).exists()


def test_the_timing_key_holds_all_that_a_time_depends_on(tmp_path):
    """Which of core's kernels was beside it, the memory layout, the scale, cuDNN and this pack's version."""
    q, k, v = fakes.qkv()
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]

    def timed(tensors=(q, k, v), scale=None, heads_first=False, core_name=CORE, environment=GPU):
        calls = []
        target = dispatcher(
            fakes.backend("good"), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE), environment=environment
        )

        def core(drop):
            calls.append(drop)
            return fakes.Core(*tensors, None, scale, heads_first)(drop)

        target.run(AttentionInputs(*tensors, None, scale, False, core, heads_first, core_name=core_name))
        return len(calls) > 1

    assert timed()
    assert not timed()
    assert timed(token_major)
    assert timed(scale=0.1)
    assert timed(heads_first=True)
    assert timed(core_name="attention_sage")
    assert timed(environment=dataclasses.replace(GPU, cudnn=91002))
    assert not timed(environment=dataclasses.replace(GPU, cudnn=91002))
    (first, *_) = json.loads((tmp_path / TIMINGS_FILE).read_text())["measured"]
    assert first.rpartition("lowbit ")[2][0].isdigit(), "this pack's version"


def test_nothing_is_timed_on_a_cpu():
    core, recorder = fakes.Core(*fakes.qkv()), fakes.Recorder()
    target = dispatcher(fakes.backend("good", recorder), environment=fakes.CPU)
    run(target, core=core)
    assert counts(target) == {CORE: 1}
    assert (core.calls, recorder.calls) == (1, [])


def test_a_backend_asked_for_by_name_is_not_timed():
    core = fakes.Core(*fakes.qkv())
    target = dispatcher(fakes.backend("slow", slow(fakes.attend, 0.002)), policy=Policy("slow", "fast"))
    run(target, core=core, times=3)
    assert counts(target) == {"slow": 3}
    assert core.calls == 0


def test_a_backend_slower_than_comfyuis_own_is_not_taken():
    target = dispatcher(fakes.backend("slow", slow(fakes.attend)))
    run(target, times=3)
    assert counts(target) == {CORE: 3}


@pytest.mark.parametrize(("lengths", "anew"), [((9, 11), False), ((10, 12), False), ((9, 23), True), ((40, 11), True)])
def test_a_prompt_of_another_length_measures_nothing_anew(tmp_path, lengths, anew):
    def calls_of_core(q_len, kv_len):
        tensors = fakes.qkv(q_len=q_len, kv_len=kv_len)
        core = fakes.Core(*tensors)
        target = dispatcher(fakes.backend("good"), timings=MeasuredNumbers(tmp_path, TIMINGS_FILE))
        run(target, tensors, core=slow(core, 0.002))
        return core.calls

    assert calls_of_core(9, 11) > 1
    assert (calls_of_core(*lengths) > 1) is anew


def test_a_large_shape_is_timed_on_some_of_its_heads(monkeypatch):
    monkeypatch.setattr(planning, "LARGE_CALL", 4.0 * 2 * 9 * 11 * 16)
    recorder = fakes.Recorder()
    target = dispatcher(fakes.backend("good", recorder), fakes.backend("other", slow(fakes.attend, 0.001)))
    tensors = fakes.qkv(heads=8)
    run(target, tensors, core=slow(fakes.Core(*tensors)))
    assert [q.shape[1] for q, *_ in recorder.calls[:-1]] == [2] * (len(recorder.calls) - 1)
    assert recorder.calls[-1][0].shape[1] == 8
    assert counts(target) == {"good": 1}
    grouped = fakes.qkv(heads=8, kv_heads=2)
    recorder.calls.clear()
    run(target, grouped, core=slow(fakes.Core(*grouped)))
    assert {q.shape[1] for q, *_ in recorder.calls} == {8}, "heads of K and V that are shared stay together"


def test_a_part_counts_as_the_whole():
    """Half the heads in 1 ms are slower than all of them in 1.5 ms."""
    calls = {"half": lambda: clock.sleep(0.004), "all": lambda: clock.sleep(0.006)}
    times, _ = measure.milliseconds(calls, CPU, {"half": 0.5})
    assert times["all"] < times["half"]


def test_what_is_far_behind_is_timed_twice_and_no_more():
    slept = []
    calls = {"quick": lambda: clock.sleep(0.001), "slow": lambda: slept.append(1) or clock.sleep(0.01)}
    times, _ = measure.milliseconds(calls, CPU)
    assert len(slept) == 3, "once to warm up, twice for the clock"
    assert times["slow"] > 5


def test_noisy_calls_decide_nothing_while_one_round_was_quiet():
    delays = iter([0.004, 0.004, *[0.1, 0.004] * 2, *[0.004] * 99])
    calls = {"noisy": lambda: clock.sleep(next(delays)), "steady": lambda: clock.sleep(0.004)}
    times, _ = measure.milliseconds(calls, CPU)
    assert times["noisy"] < 1.1 * times["steady"]


def test_a_named_backend_that_cannot_run_falls_back_to_the_fastest():
    target = dispatcher(
        fakes.backend("mine", missing="not installed"),
        fakes.backend("quick"),
        policy=Policy("mine", "fast"),
    )
    run(target, core=slow_core())
    assert counts(target) == {"quick": 1}


def test_a_backend_paired_with_the_weights_is_admitted_and_taken_where_it_is_the_fastest():
    def build(budget, kernel=fakes.attend, error_class="unbounded"):
        return dispatcher(
            fakes.backend("paired", kernel, error_class=error_class),
            fakes.backend("other", slow(fakes.attend, 0.005)),
            policy=Policy("auto", budget, paired=("paired",)),
        )

    for budget, kernel, taken in (
        ("balanced", fakes.attend, "paired"),
        ("fast", fakes.attend, "paired"),
        ("exact", fakes.attend, "other"),
        ("balanced", slow(fakes.attend), "other"),
    ):
        target = build(budget, kernel)
        run(target, core=slow_core(0.05))
        assert counts(target) == {taken: 1}
        run(target, fakes.qkv(q_len=5), core=fakes.Core(*fakes.qkv(q_len=5)), exact=True)
        assert "paired" not in [row["backend"] for row in report(target)["calls"] if row["q_len"] == 5]
    lifted = {b: Policy("auto", b, paired=("paired",)).effective_budget for b in ("exact", "balanced", "fast")}
    assert lifted == {"exact": "exact", "balanced": "fast", "fast": "fast"}


def test_a_paired_backend_is_held_to_its_own_class():
    for error_class, taken in (("fast", "exact"), ("unbounded", "paired")):
        target = dispatcher(
            fakes.backend("paired", fakes.noisy, error_class=error_class),
            fakes.backend("exact", slow(fakes.attend, 0.005)),
            policy=Policy("auto", "balanced", paired=("paired",)),
        )
        run(target, core=slow_core(0.05))
        assert counts(target) == {taken: 1}


def lossy_core(q, k, v, heads_first=False, off=100.0):
    def core(drop):
        return fakes.Core(q, k, v, heads_first=heads_first)(drop) + off

    return core


@pytest.mark.parametrize("policy", [Policy("auto", "fast"), Policy("auto", "exact")])
@pytest.mark.parametrize("heads_first", [False, True])
def test_an_exact_call_never_ends_at_a_lossy_core(policy, heads_first):
    q, k, v = fakes.qkv()
    exact = fakes.Core(q, k, v, heads_first=heads_first)
    for backends in ((), (fakes.backend("slow", slow(fakes.attend)),)):
        target = dispatcher(*backends, policy=policy)
        for _ in range(3):
            out = target.run(
                AttentionInputs(q, k, v, None, None, True, lossy_core(q, k, v, heads_first), heads_first, exact, "sage")
            )
            torch.testing.assert_close(out, fakes.Core(q, k, v, heads_first=heads_first)(False))
        assert counts(target) == {CORE_EXACT: 3}
        assert target.lossy_calls == 0


@pytest.mark.parametrize("heads_first", [False, True])
def test_a_lossy_core_is_held_to_the_budget_and_counted_as_lossy(heads_first):
    q, k, v = fakes.qkv()
    exact = fakes.Core(q, k, v, heads_first=heads_first)
    for off, taken in ((1e-4, {CORE: 8}), (100.0, {CORE_EXACT: 8}), (torch.nan, {CORE_EXACT: 8})):
        target = dispatcher(fakes.backend("other"), policy=Policy("auto", "balanced"), environment=fakes.CPU)
        for _ in range(8):
            core = lossy_core(q, k, v, heads_first, off)
            out = target.run(AttentionInputs(q, k, v, None, None, False, core, heads_first, exact, "sage"))
            torch.testing.assert_close(out, exact(False), atol=1e-3, rtol=0)
        assert counts(target) == taken
        assert target.lossy_calls == (8 if CORE in taken else 0)
        assert [item["backend"] for item in report(target)["struck_off"]] == ([] if CORE in taken else [CORE])


def test_a_lossy_core_that_raises_or_is_barred_gives_way_to_the_exact_one():
    q, k, v = fakes.qkv()
    exact = fakes.Core(q, k, v)
    target = dispatcher(policy=Policy("auto", "fast"))
    target.run(AttentionInputs(q, k, v, None, None, False, raising, False, exact, "sage"))
    assert counts(target) == {CORE_EXACT: 1}
    target = dispatcher(policy=Policy("auto", "fast"))
    target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v), False, exact, "sage"))
    assert target.bar_lossy("the output was not finite") == [CORE]
    for tensors in ((q, k, v), fakes.qkv(q_len=5)):
        target.run(AttentionInputs(*tensors, None, None, False, raising, False, fakes.Core(*tensors), "sage"))
    assert counts(target) == {CORE: 1, CORE_EXACT: 2}
    target.unbar([CORE])
    target.run(AttentionInputs(q, k, v, None, None, False, fakes.Core(q, k, v), False, exact, "sage"))
    assert counts(target) == {CORE: 2, CORE_EXACT: 2}
