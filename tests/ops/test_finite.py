"""Claims about NaN and Inf in stored numbers: every one is found, in every dtype and at every place, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ops.finite import FLOAT_BITS, FiniteCheck, first_not_finite

DTYPES = sorted(FLOAT_BITS, key=str)


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64).isfinite() if tensor.dtype != torch.float64 else tensor.isfinite()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 1], ids=str)
def test_every_code_of_eight_bits(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for code, finite in zip(codes, is_finite(codes), strict=True):
        assert (first_not_finite([("a", code.view(1))]) is None) == bool(finite), code


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.data())
def test_any_bits_at_any_place(dtype, data):
    size = data.draw(st.integers(1, 300))
    raw = data.draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    assert (first_not_finite([("a", tensor)]) is None) == bool(is_finite(tensor).all())


@pytest.mark.parametrize("place", [0, (8 << 20) - 1, 8 << 20, (64 << 20) - 1, 64 << 20, (64 << 20) + 4])
def test_at_the_edges_of_the_parts_that_are_looked_at(place):
    codes = torch.zeros((64 << 20) + 5, dtype=torch.uint8)
    assert first_not_finite([("a", codes.view(torch.float8_e4m3fn))]) is None
    codes[place] = 0xFF
    assert first_not_finite([("a", codes.view(torch.float8_e4m3fn))]) == "a"


def test_the_first_of_a_file_is_named_and_integers_and_masks_are_none():
    nan = torch.tensor([1.0, torch.nan])
    tensors = [
        ("ids", torch.tensor([-1, 127])),
        ("codes", torch.tensor([-1, 127], dtype=torch.int8)),
        ("text_model.causal_attention_mask", torch.tensor([-torch.inf, 0.0])),
        ("empty", torch.empty(0)),
        ("scalar", torch.tensor(2.0)),
        ("turned", torch.ones(4, 6).t()),
        ("b", nan),
        ("c", nan),
    ]
    assert first_not_finite(tensors) == "b"
    assert first_not_finite(tensors[:-2]) is None
    check = FiniteCheck(tensors)
    assert check.first() == "b"


def test_a_check_that_is_dropped_looks_no_further(monkeypatch):
    begun, go_on, looked = threading.Event(), threading.Event(), []

    def look(piece):
        looked.append(piece)
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr("lowbit.ops.finite._look", look)
    before = set(threading.enumerate())
    check = FiniteCheck((str(index), torch.ones(1 << 15)) for index in range(100))
    begun.wait(10)
    del check
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert 0 < len(looked) < 100


def test_more_threads_look_once_somebody_waits(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    together = threading.Barrier(3)
    looks: list[int] = []

    def look(bits, data):
        looks.append(threading.get_ident())
        together.wait(30)
        return False

    monkeypatch.setattr("lowbit.ops.finite._any_not_finite", look)
    check = FiniteCheck(((str(index), torch.ones(1 << 15)) for index in range(6)), threads=1)
    while not looks:
        time.sleep(0.01)
    assert len(looks) == 1
    assert not check.answered
    assert check.first() is None
    assert len(looks) == 6
    assert len(set(looks)) == 3


@pytest.mark.parametrize("bad", [["scale 30"], ["large", "scale 30"], ["scale 0", "large"], ["scale 39"], []])
def test_small_tensors_are_looked_at_together_and_named_alone(bad):
    """Scales and weights in turns, as they lie in a file."""
    tensors = [(f"scale {index}", torch.rand(index % 4 + 1).to(DTYPES[index % 3])) for index in range(40)]
    tensors.insert(20, ("large", torch.rand(1 << 16)))
    for name, tensor in tensors:
        if name in bad:
            tensor[-1] = torch.nan
    order = [name for name, _ in tensors if name in bad]
    expected = order[0] if order else None
    assert FiniteCheck(tensors).first() == expected
    assert first_not_finite(tensors) == expected


def test_what_goes_wrong_while_looking_is_said():
    def tensors():
        yield "a", torch.ones(2)
        raise KeyError("b")

    with pytest.raises(KeyError, match="b"):
        FiniteCheck(tensors()).first()


ENDS_WHILE_LOOKING = """
import itertools
import torch
from lowbit.ops.finite import FiniteCheck
numbers = torch.ones(1 << 15)
check = FiniteCheck((str(place), numbers) for place in itertools.count())
print("looking")
"""


def test_a_process_ends_without_looking_at_the_rest(tmp_path):
    """It would read tens of GB first."""
    command = [sys.executable, "-c", ENDS_WHILE_LOOKING]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "looking\n", "")


def test_a_wait_that_is_interrupted_makes_no_numbers_of_what_was_not_looked_at(monkeypatch):
    go_on = threading.Event()

    def interrupted(future):
        go_on.set()
        raise KeyboardInterrupt

    def tensors():
        yield "a", torch.ones(1 << 15)
        go_on.wait(10)
        yield "b", torch.tensor(torch.nan)

    check = FiniteCheck(tensors())
    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check.first()
    assert check.first() == "b"
