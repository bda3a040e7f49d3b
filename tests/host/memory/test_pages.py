"""A limit's parts under dynamic VRAM: together, all that cannot give way stays within it."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from .support import GIB, device, host

__all__ = ["device", "host"]

MIB, PAGE, CHUNK = 1 << 20, 32 << 20, 16 << 20
CAPACITY = 24 * GIB


class Pages:
    """A VBAR of so many bytes."""

    def __init__(self, offset, loaded=0):
        self.offset, self.loaded, self.mark = offset, loaded, None

    def loaded_size(self):
        return self.loaded

    def free_memory(self, nbytes):
        self.loaded -= min(self.loaded, nbytes)

    def set_watermark(self, nbytes):
        self.mark = nbytes


def layer(mib: float, lora: int = 0) -> torch.nn.Linear:
    made = torch.nn.Linear(1, int(mib * MIB) // 2, bias=False, dtype=torch.bfloat16, device="meta")
    made.comfy_cast_weights = True
    if lora:
        made.weight_lowvram_function = types.SimpleNamespace(memory_required=lambda: lora * MIB)
    return made


def nbytes(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def patcher_of(blocks, loaded: int, device, dynamic: bool = True):
    model = torch.nn.Sequential(*blocks)
    pages = Pages(nbytes(model), loaded)
    return types.SimpleNamespace(
        model=model,
        pages=pages,
        load_device=device.torch_device,
        is_dynamic=lambda: dynamic,
        model_size=lambda: nbytes(model),
        _vbar_get=lambda: pages,
    )


@pytest.fixture
def gpu(host, device, monkeypatch):
    """A GPU whose allocator keeps to the cap that it is given, beside comfy-aimdo's pages and buffers."""
    from lowbit.host.memory import pages

    state = types.SimpleNamespace(fraction=1.0, pages=pages, device=device, count=1, headroom=0)
    library = types.SimpleNamespace(set_simple_vram_headroom=lambda nbytes: setattr(state, "headroom", nbytes))
    monkeypatch.setattr(host.core_memory, "aimdo_enabled", True)
    monkeypatch.setattr(host.limit.comfy_aimdo.control, "lib", library)
    monkeypatch.setattr(host.limit, "_headroom", lambda found: 256 << 20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.count)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: state.fraction, raising=False)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, index: setattr(state, "fraction", fraction)
    )
    device.torch_device = torch.device("cuda", 0)
    state.limit = host.session.session().limit
    return state


def buffers(pieces) -> int:
    """What core's two buffers, or those of blocks fetched ahead, grow to."""
    return sum(-(-size // CHUNK) * CHUNK for size in sorted(pieces, reverse=True)[:2])


def in_use(pieces) -> int:
    """Pages of the largest piece that computes: it may lie across one more than its size takes."""
    return (-(-max(pieces) // PAGE) + 1) * PAGE


def most_taken(gpu, patcher, blocks, fits: bool) -> int:
    """The most that tensors, and what does not give way to them, come to; on several GPUs no page gives way."""
    layers = [nbytes(one) for block in blocks for one in block.modules() if isinstance(one, torch.nn.Linear)]
    fixed = buffers(layers) + (buffers([nbytes(block) for block in blocks]) if fits else 0)
    if gpu.count == 1:
        return round(gpu.fraction * CAPACITY) + fixed + in_use(layers)
    streams = patcher.pages.mark < patcher.pages.offset
    return round(gpu.fraction * CAPACITY) + min(patcher.pages.mark, patcher.pages.offset) + streams * fixed


@given(
    sizes=st.lists(st.lists(st.floats(1, 300), min_size=1, max_size=4), min_size=1, max_size=6),
    limit=st.integers(2200, 24000),
    working=st.integers(0, 12000),
    loaded=st.integers(0, 4000),
    count=st.sampled_from([1, 2]),
    fraction=st.sampled_from([1.0, 0.8, 0.1]),
)
@example([[1.0], [1.0, 1.0, 258.0, 300.0], [300.0] * 4], 2200, 0, 0, 2, 0.8).via("fits whole, but for the fraction")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_and_all_that_does_not_give_way_to_them_stay_within_the_limit(
    gpu, sizes, limit, working, loaded, count, fraction
):
    """Wan streamed through 0.4 GiB of buffers that neither PyTorch's cap nor dynamic VRAM's knew of each other's."""
    blocks = [torch.nn.Sequential(*(layer(size) for size in block)) for block in sizes]
    gpu.count = count
    loaded = min(loaded * MIB, nbytes(torch.nn.Sequential(*blocks)))
    patcher = patcher_of(blocks, loaded, gpu.device)
    gpu.device.allocated = gpu.device.outside = loaded
    try:
        gpu.limit.apply(limit * MIB)
        fits = gpu.pages.part_limit(patcher, fraction, working * MIB, (), blocks)
        assert most_taken(gpu, patcher, blocks, fits) <= limit * MIB + 1
        assert 0 <= patcher.pages.mark <= fraction * limit * MIB
        assert patcher.pages.loaded <= max(patcher.pages.mark, 0)
    finally:
        gpu.limit.remove()
    assert gpu.fraction == 1.0


def test_blocks_are_fetched_ahead_only_where_the_limit_has_room_for_two_of_them(gpu):
    blocks = [torch.nn.Sequential(*(layer(100) for _ in range(5))) for _ in range(8)]
    found = {}
    for limit in (3, 16):
        patcher = patcher_of(blocks, 0, gpu.device)
        gpu.limit.apply(limit * GIB)
        found[limit] = gpu.pages.part_limit(patcher, 1.0, 2 * GIB, (), blocks)
        gpu.limit.remove()
    assert found == {3: False, 16: True}
    assert gpu.pages.part_limit(patcher, 1.0, 2 * GIB, (), blocks), "without a limit nothing is parted"
    assert gpu.fraction == 1.0


def test_a_model_that_fits_whole_beside_what_it_needs_stays_whole(gpu):
    patcher = patcher_of([layer(100) for _ in range(10)], 0, gpu.device)
    gpu.limit.apply(3 * GIB)
    gpu.pages.part_limit(patcher, 1.0, 2 * GIB)
    assert patcher.pages.mark >= patcher.pages.offset


def test_what_is_kept_free_counts_as_room_for_nobody_and_goes_with_the_limit_and_the_next_manager(host, gpu):
    patcher = patcher_of([layer(100), layer(50, lora=100)], 0, gpu.device)
    gpu.limit.apply(8 * GIB)
    gpu.pages.keep_streams_free(patcher)
    kept = gpu.limit.kept_free
    assert kept == (160 + 112 + 192) * MIB, "buffers of 150 MiB, a LoRA's 100 included, and of 100, and pages of 150"
    assert gpu.limit.room == 8 * GIB - kept
    host.release.manage_prompt("7", 8 * GIB)
    assert gpu.limit.kept_free == 0
    assert gpu.fraction == 8 / 24
    gpu.limit.keep_free(GIB)
    gpu.limit.remove()
    assert gpu.limit.kept_free == 0
    gpu.limit.keep_free(GIB)
    assert gpu.limit.kept_free == 0, "without a limit there is nothing to keep"
    assert gpu.fraction == 1.0


def test_legacy_weights_stream_through_tensors_which_the_allocator_counts_itself(gpu):
    patcher = patcher_of([layer(100)], 0, gpu.device, dynamic=False)
    gpu.limit.apply(8 * GIB)
    gpu.pages.keep_streams_free(patcher)
    assert gpu.pages.part_limit(patcher, 1.0, GIB)
    assert gpu.limit.kept_free == 0
    assert patcher.pages.mark is None
