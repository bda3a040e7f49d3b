"""The dispatcher's parts: input checks, masks, the schedule, the timing file."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.attention import checks, masks
from lowbit.attention.schedule import CALLS_AHEAD, Schedule, StepCounter, parse_blocks, step_of
from lowbit.errors import LowbitError


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_prepared_is_the_same_numbers_and_copies_only_when_it_must(data):
    shape = [data.draw(st.integers(1, 4)) for _ in range(3)] + [data.draw(st.sampled_from([1, 4, 8, 16]))]
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    offset = data.draw(st.integers(0, 9))
    x = torch.randn(2 * sum(shape) + 4096 * 2).to(dtype)[offset:]
    order = data.draw(st.permutations([0, 1, 2]))
    steps = [data.draw(st.sampled_from([0, 1, 8, 13, 64])) for _ in shape]
    steps[3] = data.draw(st.sampled_from([1, 1, 1, 2]))
    view = x.as_strided(shape, [steps[i] for i in order] + [steps[3]])
    contiguous = data.draw(st.booleans())
    out = checks.prepared(view, contiguous)
    assert torch.equal(out, view)
    assert out.data_ptr() % checks.ALIGNMENT == 0
    if contiguous:
        assert out.is_contiguous()
    assert out.stride(-1) == 1 or out.shape[-1] == 1
    for n, stride in zip(out.shape[:-1], out.stride()[:-1], strict=True):
        assert n == 1 or (stride > 0 and (stride * out.element_size() % 16 == 0 or out.is_contiguous()))
    assert checks.prepared(out, contiguous) is out or (shape[-1] * out.element_size()) % 16


def test_a_good_view_is_not_copied():
    q = torch.randn(2, 7, 3, 16).transpose(1, 2)
    assert checks.prepared(q) is q
    assert checks.prepared(q, contiguous=True) is not q
    one = torch.randn(1, 5, 3, 16)[:, :, :1]
    assert checks.prepared(one) is one


def test_a_span_past_int32_is_copied():
    far = torch.empty_strided((1, 2, 3, 8), (8, 2**31, 8, 1), dtype=torch.bfloat16, device="meta")
    assert checks.prepared(far).stride() == (48, 24, 8, 1)


@pytest.mark.parametrize(("value", "finite"), [(0.0, True), (torch.nan, False), (torch.inf, False), (3e38, True)])
def test_is_finite(value, finite):
    x = torch.randn(2, 3, 4, 8)
    x[0, 1, 2, 3] = value
    x[1, 1, 2, 3] = value
    assert checks.is_finite(x) is finite


@pytest.mark.parametrize(
    ("mask", "nothing"),
    [
        (torch.ones(1, 5, dtype=torch.bool), True),
        (torch.tensor([[True, False]]), False),
        (torch.zeros(2, 1, 5), True),
        (torch.ones(2, 1, 5), True),
        (torch.tensor([[1.0, 1.0], [2.0, 2.0]]), True),
        (torch.tensor([[0.0, -1.0]]), False),
        (torch.full((1, 4), -torch.inf), False),
        (torch.full((1, 4), torch.nan), False),
        (torch.ones(1, 4, dtype=torch.int64), False),
        (torch.empty(0, 4), False),
    ],
)
def test_masks_that_mask_nothing(mask, nothing):
    assert masks.is_trivial(mask) is nothing


def test_a_mask_is_read_once_until_it_is_written_to():
    memory = masks.MaskMemory()
    mask = torch.zeros(1, 1, 8)
    assert all(memory.masks_nothing(mask) for _ in range(50))
    assert memory.checks == 1
    mask[..., 0] = -1e9
    assert not memory.masks_nothing(mask)
    assert memory.checks == 2


def test_a_judged_mask_is_held_so_that_its_memory_cannot_become_another_mask():
    memory = masks.MaskMemory()
    idle = torch.zeros(1, 1, 64)
    storage = idle.untyped_storage().data_ptr()
    assert memory.masks_nothing(idle)
    held = weakref.ref(idle)
    del idle
    gc.collect()
    assert held() is not None
    assert held().data_ptr() == storage
    memory.forget()
    gc.collect()
    assert held() is None, "no tensor outlives the sampling run"


def test_models_that_build_a_real_mask_in_every_block_cost_one_look():
    memory = masks.MaskMemory()
    for _ in range(60):
        mask = torch.zeros(1, 1, 64)
        mask[..., :3] = -1e9
        assert not memory.masks_nothing(mask)
    assert memory.checks == 1


def test_inference_tensors_are_read_once_a_model_call():
    memory = masks.MaskMemory()
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 8)
        for _ in range(3):
            memory.new_model_call()
            assert all(memory.masks_nothing(mask) for _ in range(40))
            assert memory.checks == 1
        memory.new_model_call()
        mask[..., 0] = -1e9
        assert not memory.masks_nothing(mask)


def test_an_idle_inference_mask_is_dropped_in_every_model_call_of_a_long_run():
    memory = masks.MaskMemory()
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 8)
        for _ in range(2 * masks.CHECKS_PER_MODEL_CALL):
            memory.new_model_call()
            assert memory.masks_nothing(mask)


def test_one_large_idle_mask_is_recognized_beside_small_ones(monkeypatch):
    monkeypatch.setattr(masks, "HELD_BYTES", 100)
    memory = masks.MaskMemory()
    small, large, larger = torch.zeros(1, 8), torch.zeros(1, 100), torch.zeros(1, 200)
    assert memory.masks_nothing(small)
    assert memory.masks_nothing(large)
    assert memory.masks_nothing(large)
    assert not memory.masks_nothing(larger), "one large mask is held, not two"
    assert memory.masks_nothing(torch.zeros(1, 7))
    assert not memory.masks_nothing(torch.zeros(1, 24)), "small ones share their own allowance"


def test_no_mask_is_dropped_while_a_graph_is_captured(monkeypatch):
    """With a stand-in for a CUDA tensor: a verdict from the warm-up must not be baked into the graph."""

    class Cuda(torch.Tensor):
        is_cuda = True

    mask = torch.zeros(1, 1, 8).as_subclass(Cuda)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    memory = masks.MaskMemory()
    assert memory.masks_nothing(mask)
    capturing[0] = True
    assert not memory.masks_nothing(mask)


def test_the_number_of_looks_in_a_model_call_has_a_limit():
    memory = masks.MaskMemory()
    kept = [torch.zeros(1, 1, 8) for _ in range(masks.CHECKS_PER_MODEL_CALL + 5)]
    assert sum(memory.masks_nothing(mask) for mask in kept) == masks.CHECKS_PER_MODEL_CALL
    memory.new_model_call()
    assert memory.masks_nothing(kept[-1])


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("", set()), ("3", {3}), ("0-2, 39", {0, 1, 2, 39}), (" 1 ; 4-4 ", {1, 4})],
)
def test_blocks(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["a", "1-", "-3", "5-2", "1.5", "0-999999999"])
def test_blocks_that_are_none_say_so(text):
    with pytest.raises(LowbitError, match="exact_blocks"):
        parse_blocks(text)


def test_steps_are_found_by_sigma():
    sigmas = [14.6, 8.0, 3.0, 1.0, 0.0]
    assert [step_of(sigma, sigmas) for sigma in sigmas[:-1]] == [0, 1, 2, 3]
    assert step_of(5.0, sigmas) == 1, "a second-order sampler's call between two steps"
    assert step_of(14.6001, sigmas) == 0
    assert step_of(99.0, sigmas) == 0
    assert step_of(0.0, sigmas) == 3


FALLING = [1.0, 0.8, 0.6, 0.4, 0.0]


@pytest.mark.parametrize(
    ("calls_ahead", "churns", "calls"),
    [
        (0, False, [(1.0, 0), "r0", (0.8, 1), "r1", (0.6, 2), "r2", (0.4, 3), "r3"]),
        # dpm_2: between the steps' sigmas
        (0, False, [(1.0, 0), "r0", (0.9, 0), (0.8, 1), "r1", (0.7, 1), (0.6, 2), "r2", (0.5, 2), (0.4, 3), "r3"]),
        # heun: once more at the next step's sigma
        (1, False, [(1.0, 0), "r0", (0.8, 0), (0.8, 1), "r1", (0.6, 1), (0.6, 2), "r2", (0.4, 2), (0.4, 3), "r3"]),
        # heunpp2: at the next two, but at one before the last
        (2, False, [(1.0, 0), "r0", (0.8, 0), (0.6, 0), (0.8, 1), "r1", (0.6, 1), (0.4, 1), (0.6, 2), "r2", (0.4, 2),
                    (0.4, 3), "r3"]),
        # euler with s_churn: above the step's sigma
        (0, True, [(1.05, 0), "r0", (0.84, 1), "r1", (0.63, 2), "r2", (0.42, 3), "r3"]),
    ],
)  # fmt: skip
def test_model_calls_are_counted_with_their_step(calls_ahead, churns, calls):
    counter = StepCounter(FALLING, calls_ahead, churns)
    for call in calls:
        if isinstance(call, str):
            counter.reported(int(call[1:]))
        else:
            assert counter.step(call[0]) == call[1], call


def test_rising_sigmas_count_up_too():
    rising = [0.001, 0.25, 0.5, 0.75, 1.0]
    assert [step_of(sigma, rising) for sigma in rising[:-1]] == [0, 1, 2, 3]
    assert step_of(0.5, [0.5, 0.0]) == 0
    assert step_of(0.1, [0.1, 1.0]) == 0


def test_the_samplers_that_call_ahead_are_cores_names():
    assert all(name.startswith("sample_") and "heun" in name for name in CALLS_AHEAD)


@pytest.mark.parametrize(
    ("schedule", "exact"),
    [
        (Schedule(), [0, 0, 0, 0]),
        (Schedule(first_steps=1), [1, 0, 0, 0]),
        (Schedule(last_steps=2), [0, 0, 1, 1]),
        (Schedule(first_steps=9), [1, 1, 1, 1]),
        (Schedule(sigma_from=8.0, sigma_to=3.0), [0, 1, 1, 0]),
        (Schedule(sigma_from=3.0, sigma_to=8.0), [0, 0, 0, 0]),
    ],
)
def test_schedules(schedule, exact):
    sigmas = [14.6, 8.0, 3.0, 1.0, 0.0]
    counter = StepCounter(sigmas)
    assert [schedule.exact_at(sigma, counter) for sigma in sigmas[:-1]] == [bool(x) for x in exact]
    assert schedule.needs_sigma is any(exact)
