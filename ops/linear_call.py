"""What decides how a linear is multiplied, looked at once, and what then multiplies all inputs that are like it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.runtime import (
    ADA,
    CAN_OVERLAP,
    DESCRIPTORS_FIT,
    GEFORCE_BLACKWELL,
    HOPPER,
    INTERPRETED,
    maker_of,
    row_major_strides,
)
from ..kernels.stored_weight import StoredWeight, WeightTraits
from .linear_table import Gpu
from .scratch import Spec


@dataclass(frozen=True, eq=False)
class LinearCall:
    """All that decides how an input is multiplied, besides where it is and the values: it is looked at once.

    Attributes:
        weight: its traits.
        fast: whether the input may be quantized too.
        shape, strides: of the input, (..., K).
        dtype, device: of the input and the output.
        bias: its dtype; None: there is none.
        activation: applied to the input first.
        shared: other linears read the same input, and may have quantized it.
        gpu: what the call runs on.
    """

    weight: WeightTraits
    fast: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bias: torch.dtype | None
    activation: str | None
    shared: bool
    gpu: Gpu

    @functools.cached_property
    def rows(self) -> int:
        """M, of the input."""
        return math.prod(self.shape[:-1])

    @functools.cached_property
    def even_rows(self) -> bool:
        """Whether one step leads from each row of the input to the next: a view shows them as (M, K)."""
        steps = [step for step in zip(self.shape[:-1], self.strides[:-1], strict=True) if step[0] != 1]
        return all(outer == size * stride for (_, outer), (size, stride) in itertools.pairwise(steps))

    @property
    def short_rows(self) -> bool:
        """Whether kernels, which count within a row in 32 bits, can count through one."""
        return self.strides[-1] * self.shape[-1] < 1 << 31

    @property
    def hardware_e4m3(self) -> bool:
        """Whether the GPU converts e4m3."""
        return self.gpu.cc >= ADA and not INTERPRETED

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start while the one before still runs."""
        return CAN_OVERLAP and not INTERPRETED and self.gpu.cc >= HOPPER

    @property
    def has_room_for_descriptors(self) -> bool:
        """GeForce Blackwell (12.x) has tensor descriptors, but not the shared memory of their tiles: 99 KiB, not 227."""
        return DESCRIPTORS_FIT and HOPPER <= self.gpu.cc < GEFORCE_BLACKWELL

    def codes_spec(self, alignment: int) -> Spec:
        """The scratch that `straight` needs: none for codes that lie row by row on the alignment."""
        weight = self.weight
        return None if weight.alignment >= alignment else (weight.shape, weight.dtype)


class Product:
    """Multiplies the inputs of one `LinearCall`: x @ W.T + bias.

    What depends on the call alone is found when it is made. A call takes scratch memory, makes the output and launches.
    """

    def __init__(self, call: LinearCall) -> None:
        self.call, self.device, self.dtype = call, call.device, call.dtype
        self.out_shape = (*call.shape[:-1], call.weight.rows)
        self.new_output = maker_of(self.out_shape, call.dtype, call.device)
        self.rows, self.columns, self.count = call.rows, call.weight.columns, call.weight.rows

    def __call__(
        self,
        x: torch.Tensor,
        weight: StoredWeight,
        bias: torch.Tensor | None,
        group: str = "",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., N) in x's dtype, in `out` where that is given; group: as `quantized_linear` takes it."""
        raise NotImplementedError

    def _as_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.rows, x.shape[-1])


class CopiedFirst(Product):
    """An input whose rows kernels cannot count through."""

    def __init__(self, call: LinearCall, make: Callable[[LinearCall], Product]) -> None:
        super().__init__(call)
        self.product = make(dataclasses.replace(call, strides=row_major_strides(call.shape), shared=False))

    def __call__(self, x, weight, bias, group="", out=None):
        return self.product(x.contiguous(), weight, bias, "", out)


def straight(weight: StoredWeight, copy: torch.Tensor | None) -> StoredWeight:
    """`weight` with its codes row by row, copied into `copy` where there is one."""
    if copy is None:
        return weight
    copy.copy_(weight.data)
    return dataclasses.replace(weight, data=copy)


def bias_like(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
