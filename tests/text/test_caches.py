"""Claims about the heavy-hitter cache: it is H2O (Zhang et al. 2023), step by step, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels.attend_cache import attend_cache
from lowbit.text.caches import HEAVY_HITTERS, CachePolicy, HeavyHitterCache, LayerCache, RingCache, choose_kept

HEADS, KV_HEADS, WIDTH = 4, 2, 8


class PaperCache:
    """The paper's rule in plain Python, one key head: attend to all that is kept and the new token, then evict one."""

    def __init__(self, window: int, heavy: int, keys: torch.Tensor, values: torch.Tensor, gathered: torch.Tensor):
        self.window, self.heavy = window, heavy
        self.kept = {place: [keys[place], values[place], gathered[place].item()] for place in range(len(keys))}
        self.newest = len(keys) - 1
        while len(self.kept) > window + heavy:
            self.evict()

    def evict(self) -> None:
        older = [place for place in self.kept if place <= self.newest - self.window]
        del self.kept[min(older, key=lambda place: self.kept[place][2])]

    def step(self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.newest += 1
        self.kept[self.newest] = [key, value, 0.0]
        places = sorted(self.kept)
        keys = torch.stack([self.kept[place][0] for place in places])
        values = torch.stack([self.kept[place][1] for place in places])
        weights = (queries @ keys.T * WIDTH**-0.5).softmax(dim=-1)
        for column, place in enumerate(places):
            self.kept[place][2] += weights[:, column].sum().item()
        if len(self.kept) > self.window + self.heavy:
            self.evict()
        return weights @ values


def prompt(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(KV_HEADS, count, WIDTH), torch.randn(KV_HEADS, count, WIDTH), torch.rand(KV_HEADS, count) * 3


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 6), st.integers(0, 1000))
@settings(max_examples=25)
def test_it_keeps_what_the_papers_rule_keeps(count, window, heavy, seed):
    torch.manual_seed(seed)
    keys, values, gathered = prompt(count)
    cache = HeavyHitterCache(CachePolicy(HEAVY_HITTERS, window, heavy), keys, values, gathered)
    paper = [PaperCache(window, heavy, keys[kv], values[kv], gathered[kv]) for kv in range(KV_HEADS)]
    for number in range(12):
        step = torch.tensor([number])
        queries, key, value = torch.randn(HEADS, WIDTH), *torch.randn(2, KV_HEADS, WIDTH)
        slot = cache.slot(step)
        cache.key[torch.arange(KV_HEADS), slot] = key
        cache.value[torch.arange(KV_HEADS), slot] = value
        out = attend_cache(queries, cache.key, cache.value, step, cache.start, WIDTH**-0.5, cache.gathered)
        groups = HEADS // KV_HEADS
        expected = [
            one.step(queries[kv * groups : (kv + 1) * groups], key[kv], value[kv]) for kv, one in enumerate(paper)
        ]
        torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert cache.slots == window + heavy + 1


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 10))
@settings(max_examples=25)
def test_a_prompt_leaves_its_newest_and_heaviest_tokens(count, window, heavy):
    gathered = torch.rand(KV_HEADS, count)
    kept = choose_kept(CachePolicy(HEAVY_HITTERS, window, heavy), gathered)
    for row, weights in zip(kept.tolist(), gathered, strict=True):
        assert row == sorted(set(row))
        assert len(row) == min(count, window + heavy)
        older = [place for place in range(count) if place not in row]
        assert all(place in row for place in range(max(0, count - window), count))
        heaviest = [weights[place] for place in row if place < count - window]
        assert not older or not heaviest or max(weights[place] for place in older) <= min(heaviest)


def test_a_cache_that_holds_everything_never_gives_a_token_up():
    keys, values, gathered = prompt(5)
    cache = HeavyHitterCache(CachePolicy(HEAVY_HITTERS, 8, 8), keys, values, gathered)
    assert [cache.slot(torch.tensor([step])).tolist() for step in range(11)] == [
        [slot] * KV_HEADS for slot in range(5, 16)
    ]


@pytest.mark.parametrize(("kind", "expected"), [(LayerCache, [5, 6, 7]), (RingCache, [1, 2, 3])])
def test_slots_of_the_other_caches(kind, expected):
    cache = kind(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), 5)
    assert [cache.slot(torch.tensor([step])).item() for step in range(3)] == expected
