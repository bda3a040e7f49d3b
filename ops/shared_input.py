"""Lets linears that read one tensor quantize it once: they find its rows in the scratch memory of the one before."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import NamedTuple

import torch

from .scratch import Cut

FIRST = "first of "
"""Before a group's name: the linear that is called before the others, which takes no rows that are left of its last time."""


class SharedInput(NamedTuple):
    """An input in the state it had, and how its rows were quantized.

    Attributes:
        source: the tensor that the linears were handed; a new one at the same address is another.
        state: its address, shape, strides and, where PyTorch counts it, version.
        how: what the quantized rows depend on besides.
        anew: they are not to be found, but left for others.
    """

    source: weakref.ref[torch.Tensor]
    state: Hashable
    how: Hashable
    anew: bool

    @classmethod
    def of(cls, x: torch.Tensor, group: str, how: Hashable) -> SharedInput:
        """`x` as it is now, for the linears of a group.

        Tensors made in inference mode count no versions, and a compiled graph makes one tensor after the other in the same
        place. So only linears of one group share, which read their input one after the other, from `FIRST` on.
        """
        version = None if x.is_inference() else x._version
        name = group.removeprefix(FIRST)
        return cls(weakref.ref(x), (x.data_ptr(), x.shape, x.stride(), version), (name, how), name != group)

    def is_left(self, left: tuple[Cut, SharedInput] | None, cut: Cut) -> bool:
        """Whether an earlier linear left this input's quantized rows in `cut`."""
        if left is None or self.anew:
            return False
        # A cut by other specs, or of a buffer that was released since, is another one.
        held, other = left
        same = self.source() is other.source() and self.state == other.state and self.how == other.how
        return held is cut and same
