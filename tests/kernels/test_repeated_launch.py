"""Norms, modulation, rotary embeddings and joined heads launched again: what is given to the compiled kernels, without a GPU."""

from __future__ import annotations

import functools

import pytest
import torch

from lowbit.kernels import join_heads as joining
from lowbit.kernels import launch as launch_module
from lowbit.kernels import modulate_rows as modulation
from lowbit.kernels import normalize as norm
from lowbit.kernels import repeated_launch
from lowbit.kernels import rope as rotary

from .launches import Launches, WatchedReplay


def norm_of_rows(sizes):
    return functools.partial(norm.normalize, bias=None, eps=1e-6, centered=False), (
        torch.randn(*sizes, 64).half(),
        torch.randn(64).half(),
    )


def norm_of_heads(sizes):
    x = torch.randn(*sizes, 3, 64).half().transpose(1, 2)
    return functools.partial(norm.normalize, eps=1e-6, centered=True), (x, *torch.randn(2, 64).half())


def modulation_of_rows(sizes):
    shift, factor = torch.randn(sizes[0], 1, 128).half().chunk(2, -1)
    return modulation.modulate_rows, (shift, torch.randn(*sizes, 64).half(), factor)


def rotation_of_heads(sizes):
    return rotary.rope, (torch.randn(*sizes, 3, 64).half(), torch.randn(1, sizes[1], 1, 32, 2, 2))


def heads_of_two(sizes):
    batch, length = sizes
    heads = (torch.randn(batch, rows, 3, 64).half().transpose(1, 2) for rows in (length, 4))
    return joining.join_heads, tuple(heads)


CASES = (norm_of_rows, norm_of_heads, modulation_of_rows, rotation_of_heads, heads_of_two)
CACHES = norm.norm_launch, modulation.modulation_launch, rotary.rope_launch, joining.joint_launch


@pytest.fixture
def launches(monkeypatch):
    """As on a GPU; what a new tensor is made for is always the same one."""
    out: dict[tuple[int, ...], torch.Tensor] = {}
    same = lambda shape, dtype, device: lambda: out.setdefault(shape, torch.empty(shape, dtype=dtype))  # noqa: E731
    monkeypatch.setattr(repeated_launch, "maker_of", same)
    monkeypatch.setattr(repeated_launch, "Replay", WatchedReplay)
    for module in (norm, modulation, rotary, joining):
        monkeypatch.setattr(module, "kernels_run_on", lambda x: True)
    forget()
    yield Launches(monkeypatch)
    forget()


def forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.parametrize("sizes", [(1, 5), (2, 40)])
@pytest.mark.parametrize("case", CASES)
def test_later_calls_launch_what_the_first_would_have(case, sizes, launches):
    """With their own tensors, and without Triton's front end, which `WatchedReplay` lets be called once."""
    (function, first), (_, second) = case(sizes), case(sizes)
    function(*first)
    launches.clear()
    function(*second)
    again = list(launches)
    launches.clear()
    forget()
    function(*second)
    assert again == launches
    assert len(again) == launches.compiled == 1


@pytest.mark.parametrize("case", CASES)
def test_other_inputs_have_a_launch_of_their_own(case, launches):
    function, tensors = case((2, 40))
    for inputs in (tensors, case((2, 41))[1], case((1, 40))[1], tuple(tensor.float() for tensor in tensors)):
        function(*inputs)
    assert len(launches) == 4
    assert sum(cache.cache_info().currsize for cache in CACHES) == 4


@pytest.mark.parametrize("case", CASES)
def test_inputs_that_lie_elsewhere_than_on_16_bytes_go_through_triton(case, launches, monkeypatch):
    """It compiles another kernel for them."""
    monkeypatch.setattr(repeated_launch, "Replay", launch_module.Replay)
    function, (x, *others) = case((1, 5))
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    apart = storage[1:].view(x.shape) if x.is_contiguous() else storage[1:].view(1, 5, 3, 64).transpose(1, 2)
    function(x, *others)
    function(apart, *others)
    function(x, *others)
    assert launches.compiled == 2
    assert len(launches) == 3
