"""Clearing between steps: what each step takes again anyway is learned and left, anew in each run."""

from __future__ import annotations

import types

import torch

from lowbit.memory.components import DIFFUSION_MODEL

from .support import GIB, device, hooks, host, model_of

__all__ = ["device", "host"]


def test_clearing_learns_what_each_step_takes_again(host, device):
    """Steps of Wan 14B on a 16 GiB card gave gigabytes back, each only to ask for them again in the next."""
    hook = hooks(host)
    cleared = []
    for step, (allocated, idle) in enumerate(((12, 8), (12, 8), (12, 9), (4, 18), (4, 18)), start=1):
        device.allocated, device.reserved = allocated * GIB, (allocated + idle) * GIB
        before = device.cleared
        hook._clear_if_due(step)
        cleared.append(device.cleared > before)
    assert cleared == [True, False, False, True, False]


def test_each_run_learns_anew_what_its_steps_take(host, device):
    """The next sampler, or the next window, may be of another size."""
    hook = hooks(host)
    device.allocated, device.reserved = 12 * GIB, 20 * GIB
    patcher = types.SimpleNamespace(model=model_of(host, DIFFUSION_MODEL))

    def steps(*_):
        cleared = []
        for step in (1, 2):
            before = device.cleared
            device.reserved = 20 * GIB
            hook._clear_if_due(step)
            cleared.append(device.cleared > before)
        return cleared

    class Executor:
        class_obj = types.SimpleNamespace(model_patcher=patcher)

        def __call__(self, *args):
            return steps()

    noise = torch.zeros(1, 4)
    assert hook.outer_sample(Executor(), noise) == [True, False]
    assert hook.outer_sample(Executor(), noise) == [True, False]
