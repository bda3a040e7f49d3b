"""One new tensor from others by a launch that is looked for once for all inputs that are alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .launch import Replay, addresses_of
from .runtime import maker_of

MOST_KINDS = 1024
"""Kinds of inputs that each function keeps its launch for."""


class Traits(NamedTuple):
    """All of a tensor but its values and where they are."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether rows follow each other as they do in a new tensor."""
        return torch.empty_strided(self.shape, self.strides, device="meta").is_contiguous()


def traits_of(tensor: torch.Tensor) -> Traits:
    """Those of a tensor."""
    return Traits(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class RepeatedLaunch:
    """What a function of some tensors launches, for one GPU, the current one, and inputs of the same traits each time.

    Args:
        launches: called with the new tensor and the inputs; launches, and does nothing besides.
        shape, dtype: of the new tensor, row-major.
        device: of all of them.
    """

    __slots__ = ("_launches", "_new_output", "_replay")

    def __init__(
        self, launches: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._launches = launches
        self._new_output = maker_of(shape, dtype, device)
        self._replay = Replay()

    def __call__(self, *tensors: Any) -> torch.Tensor:
        """The new tensor; None among the inputs stays None."""
        out = self._new_output()
        places = addresses_of([], out, *tensors)
        if not self._replay.again(places):
            self._replay.record(places, self._launches, out, *tensors)
        return out
