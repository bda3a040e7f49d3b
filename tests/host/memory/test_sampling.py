"""The memory manager's hooks around a sampling run: weights kept, room reserved, batches split, memory given back."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.errors import MemoryBudgetError

from .support import GIB, device, hooks, host, stepping

__all__ = ["device", "host"]


def streaming(pages, device):
    """A patcher whose model dynamic VRAM streams."""
    return types.SimpleNamespace(
        is_dynamic=lambda: True, _vbar_get=lambda: pages, load_device=device.torch_device, model=torch.nn.Module()
    )


@pytest.mark.parametrize(("policy", "share"), [("auto", None), ("speed", None), ("balanced", 0.8), ("lowest", 0.1)])
def test_dynamic_vram_keeps_no_more_weights_than_the_policys_share(host, device, policy, share):
    calls = []
    pages = types.SimpleNamespace(
        set_watermark=lambda nbytes: calls.append(("mark", nbytes)),
        free_memory=lambda nbytes: calls.append(("free", nbytes)),
        loaded_size=lambda: 20 * GIB,
    )
    patcher = streaming(pages, device)
    hooks(host, policy=policy).loaded(patcher, None, 0, False, False)
    if share is None:
        assert calls == []
    else:
        mark = int(share * 24 * GIB)
        assert calls == [("free", 20 * GIB - mark), ("mark", mark)]
    legacy = streaming(None, device)
    legacy.is_dynamic, legacy._vbar_get = (lambda: False), lambda: pytest.fail("there is no VBAR")
    hooks(host, policy=policy).loaded(legacy)
    old = types.SimpleNamespace(**vars(patcher) | {"_vbar_get": lambda: types.SimpleNamespace()})
    hooks(host, policy=policy).loaded(old)


def test_under_a_limit_weights_leave_room_for_what_the_run_needs_beside_them(host, device):
    """PyTorch's allocator and dynamic VRAM keep to the limit each on its own."""
    marks = []
    pages = types.SimpleNamespace(
        set_watermark=marks.append, free_memory=lambda nbytes: 0, loaded_size=lambda: 2 * GIB, offset=20 * GIB
    )
    patcher = streaming(pages, device)
    device.allocated = 3 * GIB  # the pages and 1 GiB of others
    host.session.session().limit.apply(10 * GIB)
    under = hooks(host, policy="auto", limit_bytes=10 * GIB)
    under._working = 4 * GIB
    under.loaded(patcher)
    assert marks == [10 * GIB - 4 * GIB - GIB]
    under._working = 40 * GIB
    under.loaded(patcher)
    assert marks[1] == 0, "all of them stream"


class FullGpu:
    """A step that fails the first time; moves the state of the run on as far as it gets."""

    def __init__(self, options):
        self.options, self.calls, self.seen = options, 0, []

    def __call__(self, model, conds, x_in, timestep, model_options):
        self.calls += 1
        for cache in self.options.get("transformer_options", {}).get("ar_state", {}).get("kv_caches", ()):
            self.seen.append(dict(cache))
            cache["end"] += 3
        if self.calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"


def step(host, device, monkeypatch, options):
    monkeypatch.setattr(host.core, "current_loaded_models", [])
    model = stepping(dynamic=False)
    full = FullGpu(options)
    return full, lambda: hooks(host).calc_cond_batch(full, model, [None], torch.zeros(1, 4, 8, 8), None, options)


def test_a_step_done_again_starts_from_the_caches_that_it_had(host, device, monkeypatch):
    """Autoregressive Wan's end moves with every forward."""
    cache = {"end": 5}
    options = {"transformer_options": {"ar_state": {"kv_caches": [cache], "crossattn_caches": None}}}
    full, run = step(host, device, monkeypatch, options)
    assert run() == "done"
    assert full.seen == [{"end": 5}, {"end": 5}]
    assert cache == {"end": 8}


def test_a_step_on_several_gpus_is_not_done_again(host, device, monkeypatch):
    """What the other GPUs' threads had done would lie in core's queues, and be taken for the next step's results."""
    full, run = step(host, device, monkeypatch, {"multigpu_clones": {}})
    with pytest.raises(MemoryBudgetError, match="step 1 of 0 ran out of memory on one of several GPUs"):
        run()
    assert full.calls == 1


def test_the_reserve_is_larger_for_the_length_of_a_load_even_when_it_fails(host):
    before = host.core.EXTRA_RESERVED_VRAM

    def load():
        with host.sampling._more_reserved(5 * GIB):
            assert before + 5 * GIB == host.core.EXTRA_RESERVED_VRAM
            raise ValueError("in the load")

    with pytest.raises(ValueError, match="in the load"):
        load()
    assert before == host.core.EXTRA_RESERVED_VRAM


def test_core_is_told_of_no_room_for_a_batch_only_while_it_asks(host):
    class Patcher:
        def get_free_memory(self, device):
            return 7

    patcher = Patcher()

    def call():
        with host.sampling.seeing_free_memory(patcher, 0):
            with host.sampling.seeing_free_memory(patcher, 0):
                assert patcher.get_free_memory("cpu") == 0
            assert patcher.get_free_memory("cpu") == 0, "an inner call must not undo the outer one"
            raise ValueError("in the call")

    with pytest.raises(ValueError, match="in the call"):
        call()
    assert patcher.get_free_memory("cpu") == 7
    with host.sampling.seeing_free_memory(patcher, 2):
        assert patcher.get_free_memory("cpu") == 14
