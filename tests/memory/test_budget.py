"""A refusal is right, and what it proposes would really make the run fit."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lowbit.memory.budget import GIB, HOST_HEADROOM, Demand, host_refusal, refusal, useful_changes

WAN = Demand(
    largest_layer=140 << 20,
    working=6 * GIB,
    fixed=GIB,
    text_encoder=GIB // 2,
    bits=16.0,
    width=1280,
    height=720,
    frames=81,
)

demands = st.builds(
    Demand,
    largest_layer=st.integers(0, 4 * GIB),
    working=st.integers(1, 64 * GIB),
    fixed=st.integers(GIB, 8 * GIB),
    text_encoder=st.integers(0, GIB),
    bits=st.sampled_from([4.6, 8.0, 8.5, 16.0, 32.0]),
    width=st.integers(4, 200).map(lambda side: side * 16),
    height=st.integers(4, 200).map(lambda side: side * 16),
    frames=st.integers(0, 40).map(lambda count: 4 * count + 1),
)


@given(demand=demands, budget=st.integers(0, 96 * GIB), limited=st.booleans())
def test_exactly_what_does_not_fit_is_refused(demand, budget, limited):
    assert (refusal("WAN21", demand, budget, limited) is None) is (demand.least <= budget)


@given(demand=demands, budget=st.integers(0, 96 * GIB))
def test_changes_help_and_those_that_suffice_come_first(demand, budget):
    changes = useful_changes(demand, budget)
    assert (refusal("WAN21", demand, budget, limited=True) or "").count("; or ") <= 2
    assert all(change.least < demand.least for change in changes)
    enough = [change.least <= budget for change in changes]
    assert enough == sorted(enough, reverse=True)


@given(budget=st.integers(2 * GIB, 7 * GIB))
def test_a_proposed_picture_really_fits(budget):
    for change in useful_changes(WAN, budget):
        size = re.search(r"make it (\d+)x(\d+)", change.text)
        frames = re.search(r"make (\d+) frames", change.text)
        if size:
            width, height = (int(side) for side in size.groups())
            assert width % 16 == height % 16 == 0
            working = WAN.working * width * height / (WAN.width * WAN.height)
            assert working + WAN.least - WAN.working <= budget + 1
        if frames:
            assert int(frames[1]) % 4 == 1
            assert WAN.working * int(frames[1]) / WAN.frames + WAN.least - WAN.working <= budget + 1


def test_the_sentence_has_the_numbers_and_three_ways_out():
    sentence = refusal("WAN21", WAN, 5 * GIB, limited=False)
    assert "WAN21 at 1280x720, 81 frames, needs at least 7.27 GiB" in sentence
    assert "and the GPU has 5.00 GiB for it: " in sentence, "the card may be larger, with other programs on it"
    assert sentence.count("; or ") == 2
    assert "make 49 frames" in sentence
    assert sentence.count(".") - len(re.findall(r"\d\.\d", sentence)) == 1, "one sentence"


def test_with_a_limit_the_first_way_out_is_to_raise_it():
    sentence = refusal("WAN21", WAN, 5 * GIB, limited=True)
    assert "the limit is 5.00 GiB: raise vram_limit_gib to 7.5; or" in sentence


def test_a_limit_is_not_to_be_raised_past_the_card():
    assert "raise vram_limit_gib" in refusal("WAN21", WAN, 5 * GIB, limited=True, card=WAN.least)
    sentence = refusal("WAN21", WAN, 5 * GIB, limited=True, card=WAN.least - 1)
    assert "raise vram_limit_gib" not in sentence
    assert "the limit is 5.00 GiB" in sentence


def test_where_nothing_helps_the_sentence_still_says_what_is_in_the_way():
    stuck = replace(WAN, bits=4.5, frames=1, text_encoder=0)
    assert useful_changes(stuck, GIB // 2) == []
    sentence = refusal("WAN21", stuck, GIB // 2, limited=False)
    assert sentence.endswith("the GPU has 0.50 GiB for it: close what else uses the GPU.")


def test_a_text_encoder_that_stays_on_the_gpu_is_the_cheapest_to_move():
    changes = useful_changes(WAN, WAN.least - 1)
    assert "text encoder on the CPU" in changes[0].text
    assert changes[0].least == WAN.least - WAN.text_encoder


def test_main_memory_is_checked_with_headroom():
    assert host_refusal("wan.safetensors", 10 * GIB, 10 * GIB + HOST_HEADROOM, 16.0) is None
    sentence = host_refusal("wan.safetensors", 28 * GIB, 20 * GIB, 16.0)
    assert sentence.startswith("Loading wan.safetensors takes 28.00 GiB of main memory and 20.00 GiB are left")
    assert "format int8 (14.88 GiB)" in sentence
    assert "format fp4_scaled (8.05 GiB)" in sentence
    assert sentence.count("; or ") == 2
    assert "choose the format" not in host_refusal("wan.safetensors", 28 * GIB, 20 * GIB, 4.5)
