"""Quantizes an input row by row, to e4m3 or int8, and multiplies it with 8-bit codes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.decode_rows import decode_rows
from ..kernels.launch import Replay, addresses_of
from ..kernels.matmul_hopper import matches_cublas
from ..kernels.matmul_rows import matmul_rows
from ..kernels.quantize_rows import quantize_rows, quantize_rows_reference
from ..kernels.rotate_rows import rotate_rows
from ..kernels.runtime import GLUON_FOUND, HOPPER, made_to_keep
from ..kernels.stored_weight import FP8, INT8, MXFP8, NVFP4
from .linear_call import CopiedFirst, LinearCall, Product, bias_like, straight
from .linear_reference import linear_reference
from .linear_table import Gpu
from .scratch import Spec, scratch_here
from .shared_input import SharedInput

_log = logging.getLogger("lowbit.linear")

_E4M3 = torch.float8_e4m3fn

CHUNK_NBYTES = 512 << 20
"""Quantized activations kept in scratch at once; longer inputs are multiplied in pieces of rows."""


def rows_or_pieces(make: Callable[[LinearCall], Product], call: LinearCall) -> Product:
    """What `make` makes of a call, one after the other for the pieces of a long input.

    Samples may lie apart, such as the texts' part of two prompts' attention; rows further apart than that are copied.
    """
    if call.rows * call.weight.columns > CHUNK_NBYTES:
        make = functools.partial(_InPieces, make=make)
    elif len(call.shape) == 3 and call.short_rows:
        return make(call)
    return make(call) if call.even_rows and call.short_rows else CopiedFirst(call, make)


class _InPieces(Product):
    """An input whose quantized rows are more than `CHUNK_NBYTES`: equal pieces of it, one after the other."""

    def __init__(self, call: LinearCall, make: Callable[[LinearCall], Product]) -> None:
        super().__init__(call)
        rows = torch.empty_strided(call.shape, call.strides, device="meta").view(self.rows, self.columns)
        self.pieces = _row_chunks(self.rows, self.columns)
        sizes = {stop - start for start, stop in self.pieces}
        alone = dataclasses.replace(call, strides=rows.stride(), shared=False)
        self.products = {size: make(dataclasses.replace(alone, shape=(size, self.columns))) for size in sizes}

    def __call__(self, x, weight, bias, group="", out=None):
        x, out = self._as_rows(x), torch.empty(self.rows, self.count, dtype=self.dtype, device=self.device)
        for start, stop in self.pieces:
            piece = out[start:stop]
            made = self.products[stop - start](x[start:stop], weight, bias, "", piece)
            if made is not piece:
                piece.copy_(made)
        return out.view(self.out_shape)


def _row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of equal pieces whose quantized rows stay under `CHUNK_NBYTES`."""
    pieces = -(-rows * columns // CHUNK_NBYTES)
    size = -(-rows // pieces // 128) * 128
    size = max(size, -(-rows // pieces))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows_or_samples(x: torch.Tensor, call: LinearCall) -> torch.Tensor:
    """(M, K), or (samples, rows, K) where no view shows it so."""
    return x.view(call.rows, -1) if call.even_rows else x


class QuantizedRows(Product):
    """x is rotated (convrot) and quantized row by row, and this pack's kernel multiplies it with codes of 8 bits.

    Integer weights become int8 for it, mxfp8 and nvfp4 e4m3 with a scale per row.
    """

    def __init__(self, call: LinearCall, dtype: torch.dtype) -> None:
        """dtype: of the quantized rows, e4m3 or int8."""
        super().__init__(call)
        weight, blocks = call.weight, call.weight.kind in (MXFP8, NVFP4)
        decodes = weight.kind not in (FP8, INT8)
        self.specs: tuple[Spec, ...] = (
            ((self.rows, self.columns), dtype),
            ((self.rows, 1), torch.float32),
            ((self.count, self.columns), dtype) if decodes else None,
            ((1, self.count), torch.float32) if blocks else None,
            call.codes_spec(1 if decodes else 16),
        )
        self.how = dtype, weight.rotation, call.activation
        # By whether the quantized rows are there: what launches the rest, and all.
        self.launches = Replay(), Replay()

    def __call__(self, x, weight, bias, group="", out=None):
        out = self.new_output() if out is None else out
        scratch = scratch_here(self.device)
        left, cut = scratch.left, scratch.take(self.specs, self.device)
        shared = SharedInput.of(x, group, self.how) if self.call.shared else None
        quantized = shared is not None and shared.is_left(left, cut)
        weight = straight(weight, cut.tensors[-1])
        places = addresses_of(cut.addresses, x, out, bias, *weight.tensors)
        launches = self.launches[quantized]
        if not launches.again(places):
            launches.record(places, self._launch, quantized, x, weight, bias, out, *cut.tensors[:-1])
        if shared is not None:
            scratch.left = cut, shared
        return out

    def _launch(self, quantized, x, weight, bias, out, q, row_scale, decoded, decoded_scale):
        call, codes, scale = self.call, weight.data, weight.scale
        if decoded is not None:
            decode_rows(weight, decoded, decoded_scale, hardware_e4m3=call.hardware_e4m3)
            codes, scale = decoded, scale if decoded_scale is None else decoded_scale
        if not quantized:
            self._quantize(x, q, row_scale)
        matmul_rows(q, codes, row_scale, scale, bias, self._as_rows(out), descriptors=call.has_room_for_descriptors)

    def _quantize(self, x, q, row_scale):
        x, rotation = _rows_or_samples(x, self.call), self.call.weight.rotation
        if rotation:
            rotate_rows(x, q, row_scale, rotation, self.call.activation)
        else:
            quantize_rows(x, q, row_scale, self.call.activation)


@functools.lru_cache(maxsize=64)
def _kept_ones(count: int, device: torch.device) -> torch.Tensor:
    # Copied from the host, which waits: a kernel that fills them would run on no stream of the caller's.
    return made_to_keep(lambda: torch.ones(1, count).to(device))


def _ones(count: int, device: torch.device) -> torch.Tensor:
    """(1, count) ones, kept; while a CUDA graph is captured, ones of that graph, which only its replay writes."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.ones(1, count, device=device)
    return _kept_ones(count, device)


_FATAL = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
"""Errors that another product would run into as well."""

_UNSUPPORTED = re.compile("support|float8|invalid scaling config|not implemented|arch_mismatch", re.IGNORECASE)
"""What PyTorch and cuBLAS say of a call that they never take here; of any other failure, the next call may succeed."""


_scaled_mm_refused: set[tuple[tuple[int, int], torch.dtype]] = set()
"""(compute capability, dtype of the weight's codes) that it refused: below cc 9.0 it takes e4m3 only."""

_scaled_mm_said: set[tuple[bool, torch.dtype]] = set()
"""Warnings given: whether the call is supported, and the dtype of the weight's codes."""


def _scaled_mm_failed(error: Exception, gpu: Gpu, dtype: torch.dtype) -> None:
    """Say what multiplies instead: for good where the call is unsupported, else for this once."""
    supported = not (isinstance(error, NotImplementedError) or _UNSUPPORTED.search(str(error)))
    if not supported:
        _scaled_mm_refused.add((gpu.cc, dtype))
    if (supported, dtype) not in _scaled_mm_said:
        _scaled_mm_said.add((supported, dtype))
        _log.warning(
            "torch._scaled_mm %s here (%s); %s instead.",
            "failed this time" if supported else "does not take scales per row",
            str(error).partition("\n")[0],
            "Triton multiplies FP8" if gpu.triton else "the product is 16-bit",
        )


def fp8_rows(call: LinearCall) -> Product:
    """What multiplies FP8: cuBLAS, or where it does not take the call this pack's kernel."""
    return ScaledMm(call) if _takes_scaled_mm(call) else QuantizedRows(call, _E4M3)


def _takes_scaled_mm(call: LinearCall) -> bool:
    weight = call.weight
    return (
        call.dtype == torch.bfloat16
        and weight.rows % 16 == 0
        and weight.columns % 16 == 0
        and call.device.type == "cuda"
        and not _own_is_as_fast(call)
    )


def _own_is_as_fast(call: LinearCall) -> bool:
    # Where Triton itself launches, that takes longer than cuBLAS; without a C compiler nothing of it is built.
    if not (GLUON_FOUND and call.gpu.triton and call.gpu.cc == HOPPER):
        return False
    return matches_cublas(call.rows, call.weight.rows, call.weight.columns, call.device.index or 0)


class ScaledMm(Product):
    """x is quantized to e4m3 row by row, and cuBLAS multiplies it with FP8 codes; mxfp8 and nvfp4 become e4m3 for it.

    What it does not take is multiplied by `QuantizedRows`, or without Triton in 16 bits.
    """

    def __init__(self, call: LinearCall) -> None:
        super().__init__(call)
        weight, row_scale = call.weight, ((self.rows, 1), torch.float32)
        self.blocks = weight.kind in (MXFP8, NVFP4)
        self.codes_dtype = _E4M3 if self.blocks else weight.dtype
        # One scale for the weight goes into those of x's rows; into a copy of them, where others read them too.
        self.folds = weight.scale_mode == 1 and not self.blocks
        self.specs: tuple[Spec, ...] = (
            ((self.rows, self.columns), _E4M3),
            row_scale,
            row_scale if call.shared and self.folds else None,
            ((self.count, self.columns), _E4M3) if self.blocks else None,
            ((1, self.count), torch.float32) if self.blocks else None,
            call.codes_spec(1 if self.blocks else 16),
        )
        self.how = _E4M3, weight.rotation, call.activation
        # By whether the quantized rows are there.
        self.launches = Replay(), Replay()
        self.otherwise = QuantizedRows(call, _E4M3) if call.gpu.triton else None

    def __call__(self, x, weight, bias, group="", out=None):
        made = None
        if (self.call.gpu.cc, self.codes_dtype) not in _scaled_mm_refused:
            made = self._multiplied(x, weight, bias, group, out)
        if made is not None:
            return made if made.dim() == len(self.out_shape) else made.view(self.out_shape)
        if self.otherwise is not None:
            return self.otherwise(x, weight, bias, group, out)
        return linear_reference(x, weight, bias, fast=False, activation=self.call.activation)

    def _multiplied(self, x, weight, bias, group, out):
        scratch = scratch_here(self.device)
        left, cut = scratch.left, scratch.take(self.specs, self.device)
        shared = SharedInput.of(x, group, self.how) if self.call.shared else None
        quantized = shared is not None and shared.is_left(left, cut)
        q, row_scale, scaled, decoded, column_scale, copied = cut.tensors
        weight = straight(weight, copied)
        if self.blocks or not quantized:
            places, launches = addresses_of(cut.addresses, x, *weight.tensors), self.launches[quantized]
            if not launches.again(places):
                launches.record(places, self._launch, quantized, x, weight, *cut.tensors[:-1])
        if scaled is not None:
            row_scale = torch.mul(row_scale, weight.scale, out=scaled)
        if self.folds:
            column_scale = _ones(self.count, self.device)
        elif not self.blocks:
            column_scale = weight.scale_row
        codes = weight.transposed if decoded is None else decoded.t()
        made = _by_scaled_mm(q, codes, row_scale, column_scale, bias_like(bias, self.dtype), out, self.call)
        if shared is not None and made is not None:
            scratch.left = cut, shared
        return made

    def _launch(self, quantized, x, weight, q, row_scale, scaled, decoded, column_scale):
        if decoded is not None:
            decode_rows(weight, decoded, column_scale, hardware_e4m3=self.call.hardware_e4m3)
        if not quantized:
            folded = weight.scale if self.folds and scaled is None else None
            quantize = quantize_rows if self.call.gpu.triton else _quantize_without_triton
            quantize(_rows_or_samples(x, self.call), q, row_scale, self.call.activation, folded)


def _by_scaled_mm(
    q: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    call: LinearCall,
) -> torch.Tensor | None:
    """(q @ codes) x scales + bias by cuBLAS, (M, N), in `out` where that is given; None where it does not take it."""
    options: dict[str, Any] = {"out_dtype": call.dtype, "use_fast_accum": True, "out": out}
    try:
        return torch._scaled_mm(q, codes, row_scale, column_scale, bias=bias, **options)
    except _FATAL:
        raise
    except (RuntimeError, ValueError) as error:
        _scaled_mm_failed(error, call.gpu, codes.dtype)
        return None


def _quantize_without_triton(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, activation: str | None, folded: torch.Tensor | None
) -> None:
    quantized, row_scale = quantize_rows_reference(x.reshape(q.shape), q.dtype, 0, activation)
    q.copy_(quantized)
    scale.view(-1).copy_(row_scale if folded is None else row_scale * folded)
