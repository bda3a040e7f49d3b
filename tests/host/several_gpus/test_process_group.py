"""Whoever waits for a group's processes is woken: by the end of the group, or by what keeps them from meeting."""

from __future__ import annotations

import threading
import types

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def process_group(core_modules):
    from lowbit.host.several_gpus import process_group

    return process_group


def never_done():
    return types.SimpleNamespace(is_completed=lambda: False)


def test_who_waits_is_woken_by_the_end(process_group):
    group = process_group.ProcessGroup(types.SimpleNamespace(), CPU)
    ending = threading.Timer(0.1, group.end)
    ending.start()
    with pytest.raises(ConnectionAbortedError):
        group.wait(never_done())
    ending.join()


def test_nothing_begins_in_an_ended_group(process_group):
    begun = []
    backend = types.SimpleNamespace(alltoall_base=lambda *_: begun.append("all-to-all"))
    group = process_group.ProcessGroup(backend, CPU)
    group.end()
    with pytest.raises(ConnectionAbortedError):
        group.alltoall_base(torch.zeros(1), torch.zeros(1), [1], [1])
    assert begun == []


def test_a_meeting_can_be_left_while_it_waits(process_group):
    come = threading.Event()
    meeting = process_group.Meeting([types.SimpleNamespace(meet=come.wait)])
    assert not meeting.done(0.05)
    come.set()
    assert meeting.done(5)


def test_a_meeting_says_what_went_wrong(process_group):
    def nobody():
        raise RuntimeError("nobody is there")

    with pytest.raises(RuntimeError, match="nobody is there"):
        process_group.Meeting([types.SimpleNamespace(meet=nobody)]).done(5)


def test_an_interrupt_is_not_taken_by_the_thread_of_a_meeting(process_group):
    """It would be lost there, and whoever waits for the meeting wait on."""
    import comfy.model_management as management

    backend = types.SimpleNamespace(rank=lambda: 0, size=lambda: 2, broadcast=lambda *_: never_done())
    group = process_group.ProcessGroup(backend, CPU)
    management.interrupt_current_processing(True)
    try:
        meeting = process_group.Meeting([group])
        assert not meeting.done(0.1)
        assert management.processing_interrupted()
    finally:
        management.interrupt_current_processing(False)
    group.end()
    with pytest.raises(ConnectionAbortedError):
        meeting.done(10.0)
