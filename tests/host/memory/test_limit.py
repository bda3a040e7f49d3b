"""The VRAM limit as on a GPU: what it sets in PyTorch's allocator and in dynamic VRAM, and that it always goes again."""

from __future__ import annotations

import types

import pytest
import torch

from .support import GIB, device, host

__all__ = ["device", "host"]

CAPACITY = 24 * GIB
NO_LIMIT_OF_CUDA_MALLOC_ASYNC = (2**64 - 1) / CAPACITY
"""What PyTorch says before a limit is set where the allocator is cudaMallocAsync, which is ComfyUI's default."""


@pytest.fixture
def gpu(host, device, monkeypatch):
    """A GPU of 24 GiB with stand-ins for dynamic VRAM's library and PyTorch's allocator, which refuses what the real one refuses."""
    state = types.SimpleNamespace(fraction=NO_LIMIT_OF_CUDA_MALLOC_ASYNC, headroom=256 << 20)

    def set_fraction(fraction, index):
        if not isinstance(fraction, float):
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if fraction < 0 or fraction > 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        state.fraction = fraction

    library = types.SimpleNamespace(set_simple_vram_headroom=lambda nbytes: setattr(state, "headroom", nbytes))
    monkeypatch.setattr(host.core_memory, "aimdo_enabled", True)
    monkeypatch.setattr(host.limit.comfy_aimdo.control, "lib", library)
    monkeypatch.setattr(host.limit, "_headroom", lambda found: state.headroom)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: state.fraction, raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    device.torch_device = torch.device("cuda", 0)
    state.device = device
    return state


def aimdo_lets_take(gpu) -> int:
    """Bytes that dynamic VRAM lets this process take in all: its `deficit_simple` is usage + headroom - capacity."""
    return CAPACITY - gpu.headroom


@pytest.mark.parametrize(("before", "after"), [(NO_LIMIT_OF_CUDA_MALLOC_ASYNC, 1.0), (1.0, 1.0), (0.9, 0.9)])
def test_the_limit_goes_where_no_limit_is_a_number_that_pytorch_does_not_take_back(host, gpu, before, after):
    gpu.fraction = before
    functions = host.core.get_free_memory, host.core.get_total_memory
    limit = host.limit.VramLimit(gpu.device)
    limit.apply(6 * GIB)
    assert gpu.fraction == 0.25
    limit.remove()
    assert gpu.fraction == after
    assert gpu.headroom == 256 << 20
    assert (host.core.get_free_memory, host.core.get_total_memory) == functions


def test_a_limit_that_cannot_be_undone_in_one_place_goes_in_all_others_and_the_next_prompt_starts(
    host, gpu, monkeypatch, caplog
):
    functions = host.core.get_free_memory, host.core.get_total_memory
    current = host.session.session()
    current.limit.apply(6 * GIB)

    def broken(fraction, index):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", broken)
    current.reset()
    assert "illegal memory access" in caplog.text
    assert (host.core.get_free_memory, host.core.get_total_memory) == functions
    assert gpu.headroom == 256 << 20
    assert current.limit.nbytes is None


@pytest.mark.parametrize("others", [0, 10 * GIB], ids=["alone", "beside another program"])
def test_dynamic_vram_is_held_to_the_limit_whatever_else_is_on_the_card(host, gpu, others):
    """Its count has this process alone: what other programs hold must not be added to what it may take."""
    gpu.device.read = lambda: host.Reading(2 * GIB, 2 * GIB, 2 * GIB, CAPACITY - others - 2 * GIB, 0)
    limit = host.limit.VramLimit(gpu.device)
    limit.apply(6 * GIB)
    assert aimdo_lets_take(gpu) == 6 * GIB
    limit.remove()
    limit.apply(CAPACITY)
    assert gpu.headroom == 256 << 20, "never less than ComfyUI's own headroom"
    limit.remove()


def test_core_s_questions_reach_core_as_they_were_asked(host, gpu, monkeypatch):
    """Another version of ComfyUI may ask with an argument that this one does not know, and be told more numbers."""
    asked = []

    def answer(*arguments, **options):
        asked.append((arguments, options))
        return (20 * GIB, 2 * GIB, 12 * GIB) if options.get("torch_free_too") or options.get("everything") else 20 * GIB

    monkeypatch.setattr(host.core, "get_free_memory", answer)
    monkeypatch.setattr(host.core, "get_total_memory", answer)
    limit = host.limit.VramLimit(gpu.device)
    limit.apply(6 * GIB)
    room = 6 * GIB - gpu.device.read().allocated
    here, elsewhere = torch.device("cuda", 0), torch.device("cpu")
    assert host.core.get_free_memory(here) == room
    assert host.core.get_free_memory(dev=here, everything=True) == (room, 2 * GIB, room)
    assert host.core.get_total_memory(here, everything=True) == (6 * GIB, 2 * GIB, 6 * GIB)
    assert host.core.get_free_memory(elsewhere, everything=True) == (20 * GIB, 2 * GIB, 12 * GIB)
    assert host.core.get_free_memory() == room
    assert asked == [
        ((here,), {}),
        ((), {"dev": here, "everything": True}),
        ((here,), {"everything": True}),
        ((elsewhere,), {"everything": True}),
        ((), {}),
    ]
    limit.remove()


def test_dynamic_vram_of_another_gpu_is_left_alone(host, gpu, monkeypatch):
    """Its headroom is one for all GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    limit = host.limit.VramLimit(gpu.device)
    limit.apply(6 * GIB)
    assert gpu.headroom == 256 << 20
    assert gpu.fraction == 0.25, "PyTorch's cap is the one GPU's"
    limit.remove()


def test_a_limit_ends_with_its_prompt_not_with_the_next_one(host, gpu, monkeypatch):
    from comfy_execution import cache_provider

    monkeypatch.setattr(host.session, "where", lambda: ("a prompt", "7"))
    monkeypatch.setattr(host.session, "add_progress_handler", lambda handler: None)
    current = host.session.session()
    for _ in range(2):  # a manager runs more than once in a prompt, and core calls at the end of each prompt
        current.manage("7", 6 * GIB)
        current.manage("7", 8 * GIB)
        (provider,) = cache_provider._get_cache_providers()
        assert not provider.should_cache(None)
        provider.on_prompt_end("a prompt")
        assert current.limit.nbytes is None
        assert gpu.headroom == 256 << 20
        assert not cache_provider._get_cache_providers()
