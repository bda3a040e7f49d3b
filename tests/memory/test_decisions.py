"""When to clear, when to run prompts one at a time, how to tile: each decision against a plain statement of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.memory.decisions import (
    LEAST_CLEARED,
    VaeTiles,
    clears_now,
    plan_tiles,
    runs_one_at_a_time,
    smaller,
)
from lowbit.memory.devices import Reading
from lowbit.memory.policies import AUTO, EVERY, OFF, ON, POLICIES, SEQUENTIAL_CFG, STEP_CLEARING, Settings

GIB = 1 << 30


def reading(idle: float, allocated: float = 4) -> Reading:
    return Reading(int(allocated * GIB), int((allocated + idle) * GIB), 0, None)


@pytest.mark.parametrize(
    ("idle", "room", "clears"),
    [(5, 1, True), (5, 10, False), (1, 1, False), (0, 0, False)],
)
def test_automatic_clearing_needs_idle_memory_and_little_room(idle, room, clears):
    assert clears_now(AUTO, 1, 1, reading(idle), room * GIB, 16 * GIB, 0.25) is clears


@pytest.mark.parametrize(("returning", "clears"), [(0, True), (5, False), (1.5, False), (0.5, True)])
def test_automatic_clearing_leaves_what_each_step_takes_again(returning, clears):
    assert clears_now(AUTO, 1, 1, reading(5), GIB, 16 * GIB, 0.25, int(returning * GIB)) is clears


def test_automatic_clearing_never_bothers_with_little():
    little = Reading(0, LEAST_CLEARED, 0, None)
    assert not clears_now(AUTO, 1, 1, little, 0, GIB, 0.0)


def test_off_never_clears_and_every_n_always_does_then():
    assert not any(clears_now(OFF, 1, step, reading(100), 0, GIB, 0.0) for step in range(1, 10))
    assert [step for step in range(1, 10) if clears_now(EVERY, 3, step, reading(0), GIB, GIB, 1.0)] == [3, 6, 9]


gib = st.floats(0, 64).map(lambda value: int(value * GIB))


@given(weights=gib, single=gib, more=gib, budget=gib, prompts=st.integers(1, 4), choice=st.sampled_from(SEQUENTIAL_CFG))
def test_one_at_a_time_is_chosen_exactly_when_it_streams_less_or_the_batch_does_not_fit(
    weights, single, more, budget, prompts, choice
):
    streamed_in_a_batch = weights - max(0, min(weights, budget - single - more))
    streamed_apart = prompts * (weights - max(0, min(weights, budget - single)))
    answer = runs_one_at_a_time(choice, prompts, weights, single, single + more, budget)
    if prompts == 1 or choice == OFF:
        assert not answer
    elif choice == ON or single + more > budget:
        assert answer
    else:
        assert answer is (streamed_apart < streamed_in_a_batch)


def test_with_plenty_of_memory_auto_is_cores_choice():
    assert not runs_one_at_a_time(AUTO, 2, 20 * GIB, 2 * GIB, 4 * GIB, 80 * GIB)


def test_a_model_that_just_fits_beside_one_prompt_runs_them_apart():
    assert runs_one_at_a_time(AUTO, 2, 12 * GIB, 4 * GIB, 8 * GIB, 16 * GIB)


def test_a_model_that_streams_most_of_itself_runs_them_together():
    assert not runs_one_at_a_time(AUTO, 2, 40 * GIB, 4 * GIB, 8 * GIB, 16 * GIB)


@given(
    height=st.integers(8, 512),
    width=st.integers(8, 512),
    frames=st.integers(1, 41),
    smallest=st.sampled_from([8, 16, 32]),
    room=st.floats(1, 1e8),
    counts_frames=st.booleans(),
)
def test_tiles_are_as_large_as_fits(height, width, frames, smallest, room, counts_frames):
    def estimate(size: int, length: int | None) -> float:
        shown = min(length or frames, frames) if counts_frames else 1
        return 100.0 * min(size, height) * min(size, width) * shown

    tiles = plan_tiles(estimate, height, width, frames, smallest, room)
    whole = max(height, width)
    if estimate(whole, None) <= room:
        assert tiles is None
        return
    if tiles is None:
        assert whole <= smallest, "it cannot be cut"
        assert frames <= 2 or not counts_frames or room < 0
        return
    assert min(whole, smallest) <= tiles.size <= max(smallest, -(-whole // 2))
    assert 1 <= tiles.overlap < tiles.size
    fits = estimate(tiles.size, tiles.frames) <= room
    # Larger tiles would not fit; if these do not either, they are the smallest there are.
    assert fits or (tiles.size == min(whole, smallest) and (not counts_frames or frames <= 2 or tiles.frames == 2))
    larger = 2 * tiles.size
    if fits and tiles.frames is None and larger < whole and tiles.size > smallest:
        assert estimate(larger, None) > room or larger > -(-whole // 2) + 1
    if tiles.frames is not None:
        assert estimate(tiles.size, None) > room
        assert 2 <= tiles.frames < frames
        assert 1 <= tiles.overlap_frames < tiles.frames


@pytest.mark.parametrize(
    ("start", "frames", "tried"),
    [
        (VaeTiles(120, 30, None, None), 1, [(120, None), (60, None), (32, None)]),
        (VaeTiles(120, 30, None, None), 9, [(120, None), (60, None), (32, None), (32, 5), (32, 3), (32, 2)]),
        (VaeTiles(120, 30, 5, 1), 9, [(120, 5), (60, 5), (32, 5), (32, 3), (32, 2)]),
        (VaeTiles(32, 8, None, None), 2, [(32, None)]),
    ],
)
def test_after_running_out_tiles_get_smaller_along_the_sides_first_and_then_in_time(start, frames, tried):
    seen, tiles = [], start
    while tiles is not None:
        seen.append((tiles.size, tiles.frames))
        assert (tiles.overlap_frames is None) is (tiles.frames is None)
        tiles = smaller(tiles, 32, frames)
    assert seen == tried


def test_every_policy_is_a_whole_row_and_settings_find_it():
    assert list(POLICIES) == ["auto", "speed", "balanced", "lowest"]
    for name, choice, clearing in itertools.product(POLICIES, SEQUENTIAL_CFG, STEP_CLEARING):
        settings = Settings(name, clearing, 1, None, choice)
        row = settings.row
        assert row.name == name
        assert 0 < row.clearing_fraction <= 1
        assert 0 < row.resident_fraction <= 1
        assert settings.sequential == (row.sequential if choice == AUTO else choice)


def test_policies_are_ordered_by_what_they_leave_on_the_gpu():
    fractions = [POLICIES[name].resident_fraction for name in ("speed", "balanced", "lowest")]
    assert fractions == sorted(fractions, reverse=True)
