"""Lets linears that read one tensor quantize it once: they find its rows in the scratch memory of the one before."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import NamedTuple

import torch

from .scratch import Scratch, Spec, scratch_here, take_scratch

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
    def of(cls, x: torch.Tensor, group: str, *how: Hashable) -> SharedInput | None:
        """`x` as it is now; None outside of a group.

        Tensors made in inference mode count no versions, and a compiled graph makes one tensor after the other in the same
        place. So only linears of one group share, which read their input one after the other, from `FIRST` on.
        """
        if not group:
            return None
        version = None if x.is_inference() else x._version
        name = group.removeprefix(FIRST)
        return cls(weakref.ref(x), (x.data_ptr(), x.shape, x.stride(), version), (name, *how), name != group)

    def is_same(self, other: SharedInput) -> bool:
        """Whether `other`'s quantized rows, of an earlier linear, are this one's."""
        return not self.anew and self.source() is other.source() and self.state == other.state and self.how == other.how


class InputScratch(NamedTuple):
    """What `take_for_input` gives.

    Attributes:
        tensors: as `take_scratch` gives them.
        quantized: they hold the input's rows already.
        owner: whose they are; None where nothing is shared.
        shared: the input.
    """

    tensors: list[torch.Tensor | None]
    quantized: bool = False
    owner: Scratch | None = None
    shared: SharedInput | None = None

    def keep(self) -> None:
        """Leave the tensors, now that the rows are written, to the next linear of the group."""
        if self.owner is not None:
            self.owner.left = self.tensors, self.shared


def take_for_input(device: torch.device, shared: SharedInput | None, *specs: Spec) -> InputScratch:
    """`take_scratch`, where the one before may have left the rows of `shared`."""
    owner = None if shared is None else scratch_here(device)
    if shared is None or owner is None:
        return InputScratch(take_scratch(device, *specs))
    left = owner.left
    tensors = owner.take(specs, device)
    # Tensors of other specs, or of a buffer that was released since, are in another list.
    quantized = left is not None and left[0] is tensors and shared.is_same(left[1])
    return InputScratch(tensors, quantized, owner, shared)
