"""The sentinel is quiet about what settles, and loud about what grows; holders are found and named."""

from __future__ import annotations

import gc
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.memory.growth import MOST_PHASES, Sentinel
from lowbit.memory.holders import (
    BYTES,
    ENTRIES,
    HOLDERS,
    REFERENCE,
    Holder,
    Snapshot,
    find_growth,
    held_by,
    take_snapshot,
)

MIB = 1 << 20


def test_what_settles_in_the_first_passings_is_no_growth():
    sentinel = Sentinel()
    assert all(sentinel.mark("x", used) is None for used in (10 * MIB, 900 * MIB, 1000 * MIB, 1000 * MIB, 1005 * MIB))


def test_growth_is_reported_once_for_each_further_slack():
    sentinel = Sentinel(slack=16 * MIB)
    found = [sentinel.mark("x", 100 * MIB + 10 * MIB * index) for index in range(9)]
    assert [growth is not None for growth in found] == [False] * 4 + [True, False, True, False, True]
    assert found[4].nbytes == 20 * MIB
    assert (found[4].since, found[4].times) == (3, 5), "the third passing is what the fifth was compared with"
    assert found[6].nbytes == 20 * MIB
    assert (found[6].since, found[6].times) == (5, 7)


def test_memory_that_is_reserved_and_not_used_counts_and_is_told_apart():
    sentinel = Sentinel()
    for _ in range(3):
        sentinel.mark("x", 100 * MIB, 0)
    growth = sentinel.mark("x", 100 * MIB, 300 * MIB)
    assert growth.nbytes == growth.idle == 300 * MIB


def test_segments_that_the_allocator_keeps_now_and_then_are_noise():
    """Fifty generations of Qwen-Image on an H200 went up and down by 32 to 96 MiB of idle memory."""
    sentinel = Sentinel()
    for idle in (0, 0, 0, 64, 96, 32, 200):
        assert sentinel.mark("x", 100 * MIB, idle * MIB) is None
    assert sentinel.mark("x", 100 * MIB, 257 * MIB) is not None


def test_phases_do_not_mix():
    sentinel = Sentinel()
    for index in range(10):
        assert sentinel.mark(("model", 64), 100 * MIB) is None
        assert sentinel.mark(("model", 128), 900 * MIB) is None
        assert sentinel.mark(("new", index), 100 * index * MIB) is None


def test_the_third_passing_is_the_reference():
    sentinel = Sentinel()
    answers = []
    for _ in range(5):
        sentinel.mark("x", 1)
        answers.append(sentinel.is_reference("x"))
    assert answers == [False, False, True, False, False]
    assert not sentinel.is_reference("y")


def test_old_phases_are_forgotten():
    sentinel = Sentinel()
    for index in range(2 * MOST_PHASES):
        sentinel.mark(index, 1)
    assert len(sentinel._phases) == MOST_PHASES


@given(reference=st.integers(0, 1 << 36), later=st.integers(0, 1 << 36))
def test_growth_is_what_passes_tolerance_and_slack(reference, later):
    sentinel = Sentinel(slack=16 * MIB)
    for _ in range(3):
        sentinel.mark("x", reference)
    grown = sentinel.mark("x", later) is not None
    assert grown is (later > reference + max(16 * MIB, 0.01 * reference))


@pytest.mark.parametrize(("percent", "grown"), [(0.9, False), (1.1, True)])
def test_one_percent_of_a_large_use_is_noise(percent, grown):
    sentinel = Sentinel(slack=16 * MIB)
    for _ in range(3):
        sentinel.mark("x", 10_000 * MIB, 10_000 * MIB)
    assert (sentinel.mark("x", int(10_000 * MIB * (1 + 2 * percent / 100)), 10_000 * MIB) is not None) is grown


class Keeper:
    """Holds tensors, as a pack with a leak does."""

    def __init__(self):
        self.kept = []


@pytest.fixture
def device_type():
    return "cpu"


def test_a_python_reference_is_named_by_its_holder(device_type):
    keeper = Keeper()
    before = take_snapshot(HOLDERS, device_type)
    keeper.kept.append({"latent": torch.zeros(3, 1 << 20)})
    (grown,) = [item for item in find_growth(HOLDERS, before, device_type) if "(3, 1048576)" in item.detail]
    assert (grown.name, grown.amount, grown.freed) == (REFERENCE, 12 * MIB, False)
    assert "dict in list in" in grown.text
    assert "Keeper" in grown.text
    assert "12 MiB more" in grown.text


def test_nothing_is_named_when_nothing_grew(device_type):
    before = take_snapshot(HOLDERS, device_type)
    torch.zeros(8, 1 << 20).sum()
    assert find_growth(HOLDERS, before, device_type) == []


def test_weights_of_models_are_not_taken_for_what_grew(device_type):
    """A model that was loaded in between is no leak, and must not hide a smaller one."""
    keeper, model = Keeper(), []
    weights = lambda: model  # noqa: E731
    before = take_snapshot(HOLDERS, device_type, weights)
    model += [torch.zeros(size, 1 << 20) for size in (5, 6, 7, 8)]
    keeper.kept.append(torch.zeros(3, 1 << 20))
    assert [item.amount for item in find_growth(HOLDERS, before, device_type, weights=weights)] == [12 * MIB]


def test_views_of_one_tensor_count_once(device_type):
    base = torch.zeros(4 << 20)
    before = take_snapshot(HOLDERS, device_type)
    views = [base[index:] for index in range(50)]
    assert find_growth(HOLDERS, before, device_type) == []
    assert len(views) == 50


def test_memory_that_another_tensor_is_found_to_lie_in_has_not_grown(device_type, monkeypatch):
    base = torch.zeros(4 << 20)
    before = take_snapshot(HOLDERS, device_type)
    view = base[11:]
    objects = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: [view, *objects()])
    assert find_growth(HOLDERS, before, device_type) == []


def test_a_module_that_holds_it_is_named():
    module = types.ModuleType("leaky_pack")
    sys.modules["leaky_pack"] = module
    module.__loader__ = object()
    try:
        module.cache = [torch.zeros(10)]
        assert held_by(module.cache[0]) == "list in module leaky_pack"
    finally:
        del sys.modules["leaky_pack"]


def test_safe_holders_are_freed_and_others_get_advice():
    kept, compiled = {"workspace": 0}, {"count": 0}
    holders = [
        Holder("workspaces", BYTES, lambda: kept["workspace"], lambda: kept.update(workspace=0)),
        Holder("graphs", ENTRIES, lambda: compiled["count"], None, "compile with dynamic=True"),
        Holder("broken", BYTES, lambda: 1 // 0),
        Holder("stuck", ENTRIES, lambda: compiled["count"], lambda: 1 // 0, "restart"),
    ]
    before = take_snapshot(holders, "cuda")
    kept["workspace"], compiled["count"] = 32 * MIB, 7
    workspaces, graphs, stuck = find_growth(holders, before, "cuda")
    assert workspaces.text == "workspaces: 32 MiB more; freed"
    assert graphs.text == "graphs: 7 entries more; compile with dynamic=True"
    assert kept["workspace"] == 0
    assert stuck.text == "stuck: 7 entries more; restart"


def test_block_masks_of_flex_attention_are_counted():
    from torch.nn.attention.flex_attention import create_block_mask

    holder = next(item for item in HOLDERS if "block masks" in item.name)
    gc.collect()
    before = holder.measure()
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 512, 512, device="cpu")
    assert holder.measure() > before
    del mask
    gc.collect()
    assert holder.measure() == before


def test_compiled_graphs_are_counted():
    import torch._dynamo.utils

    holder = next(item for item in HOLDERS if item.name == "torch._dynamo")
    before = holder.measure()
    torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(3))
    assert holder.measure() > before


def test_triton_kernels_are_counted():
    jit = pytest.importorskip("triton.runtime.jit", reason="need Triton")
    holder = next(item for item in HOLDERS if item.name.startswith("Triton"))
    before = holder.measure()
    kernel = next((item for item in gc.get_objects() if type(item) is jit.JITFunction), None)
    if kernel is None:
        kernel = jit.JITFunction(_kernel)
    caches = dict(kernel.device_caches)
    kernel.device_caches[7] = ({"a": 1, "b": 2}, {}, None, None, None)
    try:
        assert holder.measure() == before + 2
    finally:
        kernel.device_caches.clear()
        kernel.device_caches.update(caches)


def _kernel(x):
    pass


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_captured_graph_may_write_into_stays(monkeypatch, captured):
    """A graph's replay writes to the addresses it was captured with: freed, they are another tensor's by then."""

    class Graph:
        pass

    cleared, graph = [], Graph() if captured else None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 8 * MIB if not cleared else 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False)
    kitchen = types.SimpleNamespace(_cublas_workspaces={0: torch.zeros(4 << 20, dtype=torch.uint8)})
    monkeypatch.setitem(sys.modules, "comfy_kitchen.backends.cuda", kitchen)
    before = Snapshot({}, take_snapshot((), "cuda").tensors)
    grown = {item.name: item for item in find_growth(HOLDERS, before, "cuda")}
    assert bool(cleared) is not captured
    assert grown["comfy-kitchen's workspaces"].freed is not captured
    assert bool(kitchen._cublas_workspaces) is captured
    del graph


def test_comfy_kitchens_workspaces_are_counted_and_freed(monkeypatch):
    holder = next(item for item in HOLDERS if "comfy-kitchen" in item.name)
    fake = types.SimpleNamespace(_cublas_workspaces={0: torch.zeros(1 << 20, dtype=torch.uint8)})
    monkeypatch.setitem(sys.modules, "comfy_kitchen.backends.cuda", fake)
    assert holder.measure() == MIB
    holder.free()
    assert holder.measure() == 0
