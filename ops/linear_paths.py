"""What multiplies by each path of the dispatch table."""

from __future__ import annotations

import dataclasses
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
from .linear_call import LinearCall, Product, bias_like, straight
from .linear_few_rows import FewRows
from .linear_kitchen import kitchen_linear
from .linear_reference import linear_reference
from .linear_table import FEW_ROWS, FP8_ROWS, INT8_ROWS, KITCHEN, REFERENCE, SCRATCH
from .scratch import Spec, scratch_here

MOST_OFFSET = 1 << 31
"""Kernels count within a row in 32 bits: a row that spans more elements than this is copied first."""


class _Copied(Product):
    """An input that kernels cannot count through, such as the texts' part of two prompts' attention: copied first."""

    def __init__(self, call: LinearCall, make: Callable[[LinearCall], Product]) -> None:
        super().__init__(call)
        strides = torch.empty(call.shape, device="meta").stride()
        self.product = make(dataclasses.replace(call, strides=strides, shared=False))

    def __call__(self, x, weight, bias, group="", out=None):
        return self.product(x.contiguous(), weight, bias, "", out)


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
    return _Decoded(call) if wide_groups else FewRows(call)


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


def product_by(path: str, call: LinearCall) -> Product:
    """What multiplies the inputs of a call by a path."""
    make = LINEAR_PATHS[path]
    return make(call) if _rows_are_even(call) else _Copied(call, make)


def _rows_are_even(call: LinearCall) -> bool:
    """Whether one step leads from each row of the input to the next, and none is too long."""
    if call.strides[-1] * call.weight.columns >= MOST_OFFSET:
        return False
    try:
        torch.empty_strided(call.shape, call.strides, device="meta").view(call.rows, call.weight.columns)
    except RuntimeError:
        return False
    return True


def kernels_take(rotation: int) -> bool:
    """Whether the kernels know a rotation of this group size; weights with another go through the reference."""
    return rotation == 0 or rotation in KERNEL_ROTATIONS
