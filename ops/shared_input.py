"""Lets linears that read one tensor quantize it once: they find its rows in the scratch memory of the one before."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .scratch import Spec, scratch_here, take_scratch


@dataclass(frozen=True, eq=False)
class SharedInput:
    """An input in the state it had, and how its rows were quantized.

    Attributes:
        source: the tensor that the linears were handed; a new one at the same address is another.
        state: its address, shape, strides and, where PyTorch counts it, version.
        how: what the quantized rows depend on besides.
    """

    source: weakref.ref[torch.Tensor]
    state: Hashable
    how: Hashable

    @classmethod
    def of(cls, x: torch.Tensor, group: str, *how: Hashable) -> SharedInput | None:
        """`x` as it is now; None outside of a group.

        Tensors made in inference mode count no versions. So only linears of one group share, which read their input one
        after the other, with no other quantized product between them.
        """
        if not group:
            return None
        version = None if x.is_inference() else x._version
        return cls(weakref.ref(x), (x.data_ptr(), x.shape, x.stride(), version), (group, *how))

    def is_same(self, other: SharedInput | None) -> bool:
        """Whether `other`'s quantized rows are this one's."""
        return (
            other is not None
            and self.source() is other.source()
            and self.state == other.state
            and self.how == other.how
        )


def take_for_input(
    device: torch.device, shared: SharedInput | None, *specs: Spec
) -> tuple[list[torch.Tensor | None], bool]:
    """`take_scratch`, and whether the tensors hold `shared`'s rows already, as `keep_for_input` left them."""
    scratch = None if shared is None else scratch_here(device)
    if shared is None or scratch is None:
        return take_scratch(device, *specs), False
    left = scratch.left(specs)
    return scratch.take(specs, device), shared.is_same(left)


def keep_for_input(device: torch.device, shared: SharedInput | None, tensors: list[torch.Tensor | None]) -> None:
    """Leave what `take_for_input` gave, now that the rows are written, to the next linear of the group."""
    scratch = None if shared is None else scratch_here(device)
    if scratch is not None:
        scratch.leave(tensors, shared)
