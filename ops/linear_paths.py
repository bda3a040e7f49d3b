"""What multiplies by each path of the dispatch table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

from ..kernels.decode_rows import decode_rows, unrotation_of
from ..kernels.launch import Replay, addresses_of
from ..kernels.matmul_blocks import COLUMNS_PER_WORD
from ..kernels.quantize_rows import apply_activation
from ..kernels.rotate_rows import KERNEL_ROTATIONS
from ..kernels.stored_weight import INT4_CODEBOOK, StoredWeight
from .linear_8bit import QuantizedRows, fp8_rows, rows_or_pieces
from .linear_call import CopiedFirst, LinearCall, Product, bias_like, straight
from .linear_few_rows import FewRows
from .linear_kitchen import kitchen_linear
from .linear_reference import linear_reference
from .linear_table import FEW_ROWS, FP8_ROWS, INT8_ROWS, KITCHEN, REFERENCE, SCRATCH
from .scratch import Spec, scratch_here


class _Reference(Product):
    """Plain torch."""

    def __call__(self, x, weight, bias, group="", out=None):
        return linear_reference(x, weight, bias, fast=self.call.fast, activation=self.call.activation)


class _Kitchen(Product):
    """comfy-kitchen's own kernels."""

    def __call__(self, x, weight, bias, group="", out=None):
        return kitchen_linear(x, weight, bias, self.call.activation).view(self.out_shape)


class _Decoded(Product):
    """The weight is decoded into scratch as x's dtype, and cuBLAS multiplies."""

    def __init__(self, call: LinearCall) -> None:
        super().__init__(call)
        self.specs: tuple[Spec, ...] = ((self.count, self.columns), call.dtype), call.codes_spec(1)
        self.unrotation = unrotation_of(call.weight.rotation, call.device, call.dtype)
        self.launches = Replay()

    def __call__(self, x, weight, bias, group="", out=None):
        (decoded, codes), places = scratch_here(self.device).take(self.specs, self.device)
        weight = straight(weight, codes)
        places = addresses_of(places, *weight.tensors, *self.unrotation)
        if not self.launches.again(places):
            self.launches.record(places, self._decode, weight, decoded)
        return F.linear(apply_activation(x, self.call.activation), decoded, bias_like(bias, self.dtype))

    def _decode(self, weight: StoredWeight, decoded: torch.Tensor) -> None:
        decode_rows(weight, decoded, hardware_e4m3=self.call.hardware_e4m3)


def _few_rows(call: LinearCall) -> Product:
    wide_groups = call.weight.kind == INT4_CODEBOOK and call.weight.group != COLUMNS_PER_WORD
    if wide_groups:
        return _Decoded(call)
    return FewRows(call) if call.even_rows and call.short_rows else CopiedFirst(call, FewRows)


LINEAR_PATHS: Mapping[str, Callable[[LinearCall], Product]] = MappingProxyType(
    {
        REFERENCE: _Reference,
        SCRATCH: _Decoded,
        FEW_ROWS: _few_rows,
        FP8_ROWS: functools.partial(rows_or_pieces, fp8_rows),
        INT8_ROWS: functools.partial(rows_or_pieces, functools.partial(QuantizedRows, dtype=torch.int8)),
        KITCHEN: _Kitchen,
    }
)


def kernels_take(rotation: int) -> bool:
    """Whether the kernels know a rotation of this group size; weights with another go through the reference."""
    return rotation == 0 or rotation in KERNEL_ROTATIONS
