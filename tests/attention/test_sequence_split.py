"""Attention over a sequence in parts, in three processes of torch.distributed alone: the whole is the same, and every dtype travels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lowbit.attention.sequence_split import shares

PROCESSES = 3


@given(some.integers(0, 500), some.lists(some.floats(0.1, 10), min_size=1, max_size=8))
def test_shares_are_all_there_is_and_nobody_goes_without(total, weights):
    parts = shares(total, weights)
    assert sum(parts) == total
    assert all(part >= (total >= len(weights)) for part in parts)


@given(some.integers(8, 500), some.integers(1, 8))
def test_equal_weights_get_equal_shares(total, count):
    parts = shares(total, [1.0] * count)
    assert max(parts) - min(parts) <= 1


def test_shares_follow_the_weights():
    assert shares(100, [1.0, 3.0]) == [26, 74] or shares(100, [1.0, 3.0]) == [25, 75]
    slow, fast = shares(32760, [1.0, 2.0])
    assert fast / slow == pytest.approx(2.0, rel=1e-3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    script = Path(__file__).with_name("split_process.py")
    command = [sys.executable, str(script), str(folder)]
    processes = [subprocess.Popen([*command, str(rank), str(PROCESSES)]) for rank in range(PROCESSES)]
    assert [process.wait(120) for process in processes] == [0] * PROCESSES
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


BOUNDS = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-3, "8 bits": 0.012}


def test_every_process_gets_its_tokens_of_the_whole(results):
    for result in results:
        assert result["cases"]
        for case in result["cases"]:
            assert case["error"] <= BOUNDS[case["bound"]], case


def test_eight_bits_err_and_no_more_than_they_may(results):
    errors = [case["error"] for result in results for case in result["cases"] if case["bound"] == "8 bits"]
    assert 1e-3 < max(errors) <= BOUNDS["8 bits"]


def test_the_first_process_gets_the_whole(results):
    assert [case["gathered"] for case in results[0]["cases"]] == [True] * len(results[0]["cases"])
    assert not any(case["gathered"] for result in results[1:] for case in result["cases"])
