"""The ledger adds up, knows its peaks, and keeps what measuring costs within its share."""

from __future__ import annotations

import mmap
import time

import pytest

from lowbit.memory import ledger as ledgers
from lowbit.memory.components import DIFFUSION_MODEL, OTHER, SCRATCH
from lowbit.memory.devices import HostDevice, resident_bytes
from lowbit.memory.ledger import ALLOWANCE, BUDGET, Ledger

from ..attention.fakes import slowness
from .fakes import Clock, FakeDevice


def test_components_and_the_rest_add_up_to_what_is_allocated():
    device = FakeDevice()
    device.allocated, device.outside = 700, 400
    ledger = Ledger(device, lambda: {DIFFUSION_MODEL: 500, SCRATCH: 50}, lambda: 33)
    sample = ledger.sample("sampling", "3", 2, 20)
    assert sample.outside == 400
    assert sample.components == {DIFFUSION_MODEL: 500, SCRATCH: 50, OTHER: 150}
    assert (sample.allocated, sample.host_pinned, sample.step, sample.steps, sample.node) == (700, 33, 2, 20, "3")
    assert ledger.run.samples == [sample]


def test_components_that_claim_more_than_there_is_leave_nothing_for_the_rest():
    device = FakeDevice()
    device.allocated = 100
    assert Ledger(device, lambda: {DIFFUSION_MODEL: 500}).sample("x").components[OTHER] == 0


def test_each_samples_peak_is_that_since_the_sample_before():
    device = FakeDevice()
    ledger = Ledger(device, dict)
    device.allocated, device.peak = 10, 90
    first = ledger.sample("a")
    device.allocated, device.peak = 20, max(device.peak, 40)
    second = ledger.sample("b")
    assert (first.peak, second.peak, ledger.run.peak) == (90, 40, 90)


def test_a_new_run_forgets_the_old_one():
    device = FakeDevice()
    ledger = Ledger(device, dict)
    device.peak = 99
    ledger.sample("a")
    ledger.released("1", ("VAE",), "asked for", 5)
    ledger.note("remark")
    device.peak = 77
    run = ledger.begin("second")
    assert (run.prompt, run.samples, run.releases, run.notes, run.peak) == ("second", [], [], [], 0)
    device.allocated = 1
    assert ledger.sample("a").peak == 1, "the peak of the time between two runs belongs to neither"


def test_a_remark_is_written_down_once():
    ledger = Ledger(FakeDevice(), dict)
    assert ledger.note("full")
    assert not ledger.note("full")
    assert ledger.run.notes == ["full"]


@pytest.mark.parametrize("spike", [333, 64, 999])
def test_a_long_run_keeps_its_peaks_in_fewer_samples(monkeypatch, spike):
    monkeypatch.setattr(ledgers, "MOST_SAMPLES", 64)
    device = FakeDevice()
    ledger = Ledger(device, dict)
    for index in range(1000):
        device.peak = 10_000 if index == spike else 10
        ledger.sample("sampling", step=index + 1, steps=1000)
    assert len(ledger.run.samples) <= 64
    assert max(sample.peak for sample in ledger.run.samples) == ledger.run.peak == 10_000
    assert [sample.step for sample in ledger.run.samples] == sorted(sample.step for sample in ledger.run.samples)


@pytest.mark.parametrize(("step", "measuring"), [(1.0, 0.001), (1.0, 0.1), (0.01, 0.0005), (0.05, 0.0001)])
def test_measuring_steps_never_takes_more_than_its_share(step, measuring):
    ledger = Ledger(FakeDevice(), dict)
    measured = 0
    for _ in range(500):
        due = ledger.may_measure_step()
        measured += due
        ledger.stepped(step, measuring if due else 0.0)
    run = ledger.run
    assert run.measuring_steps_seconds <= ALLOWANCE + BUDGET * run.stepping_seconds + measuring
    assert measured + run.skipped == 500
    # As many as the share pays for are measured, and all of them where it pays for all.
    assert measured == 500 if measuring <= BUDGET * step else 0 < measured < 500


def test_seconds_per_step_is_the_middle_one_so_that_one_slow_step_does_not_count():
    ledger = Ledger(FakeDevice(), dict)
    assert ledger.run.seconds_per_step is None
    for seconds in (60.0, 1.0, 1.1, 1.2, 1.1):
        ledger.stepped(seconds, 0.0)
    assert ledger.run.seconds_per_step == 1.1
    assert ledger.run.stepping_seconds == pytest.approx(64.4)


def test_time_spent_measuring_is_counted():
    clock = Clock(tick=0.5)
    ledger = Ledger(FakeDevice(), dict, clock=clock)
    ledger.sample("a")
    assert ledger.run.measuring_seconds == 0.5


def test_a_sample_costs_less_than_a_millisecond_on_the_host():
    ledger = Ledger(HostDevice(), dict)
    best = 1.0
    for _ in range(20):
        slow, began = slowness(1), time.thread_time()
        ledger.sample("x")
        best = min(best, (time.thread_time() - began) / slow)
    assert best < 1e-3


def test_the_host_device_reads_this_process():
    device = HostDevice()
    before = device.read()
    with mmap.mmap(-1, 64 << 20) as kept:  # a bytearray may get memory that the process has already
        kept[::4096] = b"x" * len(kept[::4096])
        after = device.read()
    assert 60 << 20 < after.allocated - before.allocated < 80 << 20
    assert after.peak >= after.allocated
    assert 0 < after.free < device.total()
    assert not device.holds_models
    assert abs(resident_bytes() + (64 << 20) - after.allocated) < 16 << 20
