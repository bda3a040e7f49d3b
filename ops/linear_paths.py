"""How each path of the dispatch table multiplies: it takes scratch memory, launches kernels and writes the output."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

from ..kernels.decode_rows import decode_rows
from ..kernels.matmul_blocks import matmul_blocks, words_width
from ..kernels.matmul_decode import matmul_decode, matvec_decode
from ..kernels.matmul_rows import matmul_rows
from ..kernels.matmul_split import matmul_split, split_rows, term_count
from ..kernels.quantize_rows import apply_activation, quantize_rows, quantize_rows_reference
from ..kernels.rotate_rows import KERNEL_ROTATIONS, rotate_rows
from ..kernels.runtime import INTERPRETED, kernels_run_on, multiprocessor_count
from ..kernels.stored_weight import FP8, INT4, INT8, MXFP8, NVFP4, StoredWeight
from .linear_table import ADA, FEW_ROWS, FP8_ROWS, HOPPER, INT8_ROWS, SCRATCH, Gpu
from .scratch import take_scratch

_log = logging.getLogger("lowbit.linear")

CHUNK_NBYTES = 512 << 20
"""Quantized activations kept in scratch at once; longer inputs are multiplied in pieces of rows."""


def _aligned(t: torch.Tensor, nbytes: int) -> bool:
    return t.stride(-1) == 1 and t.data_ptr() % nbytes == 0 and t.stride(0) * t.element_size() % nbytes == 0


def _codes_nbytes(weight: StoredWeight, alignment: int) -> int:
    """Scratch bytes that `_straight` needs: none for codes that lie row by row on the alignment."""
    data = weight.data
    if data.stride(-1) == 1 and (alignment == 1 or _aligned(data, alignment)):
        return 0
    return data.shape[0] * data.shape[1]


def _straight(weight: StoredWeight, buffer: torch.Tensor) -> StoredWeight:
    """`weight` with its codes row by row, copied into `buffer` when that is not empty."""
    if buffer.numel() == 0:
        return weight
    copy = buffer.view(weight.data.dtype).view(weight.data.shape)
    copy.copy_(weight.data)
    return dataclasses.replace(weight, data=copy)


def _bias_like(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


@functools.lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, count, device=device)


def _hardware_e4m3(gpu: Gpu) -> bool:
    return gpu.cc >= ADA and not INTERPRETED


# --- the weight decoded into scratch


def scratch_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu
) -> torch.Tensor:
    """Decode the weight into scratch as x's dtype and let cuBLAS multiply; x of any rank and strides."""
    sizes = (weight.rows * weight.columns * x.element_size(), _codes_nbytes(weight, 1))
    decoded, codes = take_scratch(x.device, *sizes)
    decoded = decoded.view(x.dtype).view(weight.rows, weight.columns)
    decode_rows(_straight(weight, codes), decoded, hardware_e4m3=_hardware_e4m3(gpu))
    return F.linear(apply_activation(x, activation), decoded, _bias_like(bias, x.dtype))


# --- few rows


def _choose_splits(tiles: int, nbytes_per_row: int, device: torch.device) -> int:
    """Parts of K so that about two programs meet on every multiprocessor, each with at least 1 KiB of a row."""
    wanted = 1.6 * multiprocessor_count(device.index or 0)
    splits = 1
    while tiles * splits < wanted and nbytes_per_row // (2 * splits) >= 1024 and splits < 16:
        splits *= 2
    return splits


def _few_rows_method(weight: StoredWeight, rows: int, dtype: torch.dtype, activation: str | None, gpu: Gpu) -> str:
    if dtype == torch.float32:
        return "matvec"
    if weight.kind == NVFP4 and _aligned(weight.data, 8):
        return "blocks"
    if weight.kind == FP8 and rows == 1 and activation is None:
        return "matvec"
    if weight.kind in (INT8, INT4) or (weight.kind == FP8 and gpu.cc >= ADA):
        return "split"
    return "matvec" if rows <= 2 else "decode"


def few_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu
) -> torch.Tensor:
    """Multiply a few rows straight from the stored codes."""
    rows, columns, count = x.shape[0], weight.columns, weight.rows
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    method = _few_rows_method(weight, rows, x.dtype, activation, gpu)
    integer = weight.kind != FP8
    terms = term_count(x.dtype, integer) if method == "split" else 0
    width = words_width(columns) if method == "blocks" else 0
    tile = 32 if method == "decode" else 64
    splits = 1 if method == "matvec" else _choose_splits(-(-count // tile), weight.data.shape[1], x.device)
    rotated, q, row_scale, words, partial, codes = take_scratch(
        x.device,
        rows * columns * x.element_size() if weight.rotation else 0,
        terms * rows * columns,
        4 * rows if terms else 0,
        16 * rows * width * x.element_size(),
        4 * splits * rows * count if splits > 1 else 0,
        _codes_nbytes(weight, 1),
    )
    weight = _straight(weight, codes)
    partial = partial.view(torch.float32).view(splits, rows, count) if splits > 1 else None
    if weight.rotation:
        rotated = rotated.view(x.dtype).view(rows, columns)
        rotate_rows(x, rotated, None, weight.rotation, activation)
        x, activation = rotated, None
    if method == "split":
        q = q.view(torch.int8 if integer else torch.float8_e4m3fn).view(terms, rows, columns)
        row_scale = row_scale.view(torch.float32)
        split_rows(x, q, row_scale, activation, planes=2 if weight.kind == INT4 else 1)
        stages = 2 if terms * rows > 64 else 6 if gpu.cc[0] == 9 else 3
        options = {"splits": splits, "assembly": not INTERPRETED, "stages": stages}
        matmul_split(q, row_scale, weight, bias, out, partial, **options)
    elif method == "blocks":
        words = words.view(x.dtype).view(16, rows, width)
        options = {"splits": splits, "assembly": not INTERPRETED, "activation": activation}
        matmul_blocks(x, words, weight, bias, out, partial, **options)
    else:
        x = apply_activation(x, activation)
        hardware = _hardware_e4m3(gpu)
        as_bytes = weight.code_name in ("e5m2", "e2m1", "int4") or (not hardware and weight.kind in (FP8, MXFP8))
        stored = weight.data.view(torch.uint8) if as_bytes else weight.data
        if method == "matvec":
            matvec_decode(x, weight, stored, bias, out, hardware_e4m3=hardware)
        else:
            options = {"splits": splits, "hardware_e4m3": hardware, "assembly": not INTERPRETED}
            matmul_decode(x, weight, stored, bias, out, partial, **options)
    return out


# --- 8-bit products


def _row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of equal pieces whose quantized rows stay under `CHUNK_NBYTES`."""
    pieces = max(1, -(-rows * columns // CHUNK_NBYTES))
    size = -(-rows // pieces // 128) * 128 if pieces > 1 else rows
    size = max(size, -(-rows // pieces))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


@functools.lru_cache(maxsize=1)
def _warn_once_scaled_mm(reason: str) -> None:
    _log.warning("torch._scaled_mm does not take scales per row here (%s); Triton multiplies FP8 instead.", reason)


_scaled_mm_refused: set[tuple[int, int]] = set()


def _fp8_matmul(
    q: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gpu: Gpu,
) -> None:
    """(q @ codes.T) x scales + bias into `out`, by cuBLAS where it takes the call."""
    n, k = codes.shape
    suits = out.dtype == torch.bfloat16 and n % 16 == 0 and k % 16 == 0 and out.is_cuda
    if suits and gpu.cc not in _scaled_mm_refused:
        columns = _ones(n, out.device) if column_scale is None else column_scale.view(1, n)
        try:
            torch._scaled_mm(
                q,
                codes.t(),
                row_scale.unsqueeze(1),
                columns,
                bias=_bias_like(bias, out.dtype),
                out_dtype=out.dtype,
                use_fast_accum=True,
                out=out,
            )
        except RuntimeError as error:
            if not kernels_run_on(out):
                raise
            _scaled_mm_refused.add(gpu.cc)
            _warn_once_scaled_mm(str(error).splitlines()[0])
        else:
            return
    column_scale = _ones(1, out.device).view(1) if column_scale is None else column_scale
    matmul_rows(q, codes, row_scale, column_scale, bias, out, descriptors=gpu.cc >= HOPPER)


def fp8_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu
) -> torch.Tensor:
    """Quantize x to e4m3 row by row and multiply with FP8 codes; mxfp8 and nvfp4 become e4m3 with a scale per row."""
    rows, columns = x.shape
    count = weight.rows
    blocks = weight.kind in (MXFP8, NVFP4)
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    chunks = _row_chunks(rows, columns)
    q, row_scale, decoded, decoded_scale, codes = take_scratch(
        x.device,
        (chunks[0][1] - chunks[0][0]) * columns,
        4 * rows,
        count * columns if blocks else 0,
        4 * count if blocks else 0,
        _codes_nbytes(weight, 1 if blocks else 16),
    )
    weight = _straight(weight, codes)
    q = q.view(torch.float8_e4m3fn).view(-1, columns)
    row_scale = row_scale.view(torch.float32)
    column_scale = weight.scale if weight.scale_mode == 2 else None
    folded = weight.scale if weight.scale_mode == 1 else None
    if blocks:
        data, column_scale, folded = decoded.view(torch.float8_e4m3fn).view(count, columns), decoded_scale, None
        column_scale = column_scale.view(torch.float32)
        decode_rows(weight, data, column_scale, hardware_e4m3=_hardware_e4m3(gpu))
    else:
        data = weight.data
    for start, stop in chunks:
        part, scale = q[: stop - start], row_scale[start:stop]
        if gpu.triton:
            quantize_rows(x[start:stop], part, scale, activation, folded)
        else:
            _quantize_without_triton(x[start:stop], part, scale, activation, folded)
        _fp8_matmul(part, data, scale, column_scale, bias, out[start:stop], gpu)
    return out


def _quantize_without_triton(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, activation: str | None, folded: torch.Tensor | None
) -> None:
    quantized, row_scale = quantize_rows_reference(x, q.dtype, 0, activation)
    q.copy_(quantized)
    scale.copy_(row_scale if folded is None else row_scale * folded)


def int8_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu
) -> torch.Tensor:
    """Rotate (convrot) and quantize x to int8 row by row, multiply with the int8 grid of an integer weight."""
    rows, columns = x.shape
    count = weight.rows
    decodes = weight.kind != INT8
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    chunks = _row_chunks(rows, columns)
    q, row_scale, decoded, codes = take_scratch(
        x.device,
        (chunks[0][1] - chunks[0][0]) * columns,
        4 * rows,
        count * columns if decodes else 0,
        _codes_nbytes(weight, 1 if decodes else 16),
    )
    weight = _straight(weight, codes)
    q = q.view(torch.int8).view(-1, columns)
    row_scale = row_scale.view(torch.float32)
    data = weight.data
    if decodes:
        data = decoded.view(torch.int8).view(count, columns)
        decode_rows(weight, data, hardware_e4m3=_hardware_e4m3(gpu))
    for start, stop in chunks:
        part, scale = q[: stop - start], row_scale[start:stop]
        if weight.rotation:
            rotate_rows(x[start:stop], part, scale, weight.rotation, activation)
        else:
            quantize_rows(x[start:stop], part, scale, activation)
        matmul_rows(part, data, scale, weight.scale, bias, out[start:stop], descriptors=gpu.cc >= HOPPER)
    return out


LINEAR_PATHS: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        SCRATCH: scratch_linear,
        FEW_ROWS: few_rows_linear,
        FP8_ROWS: fp8_rows_linear,
        INT8_ROWS: int8_rows_linear,
    }
)


def kernels_take(weight: StoredWeight) -> bool:
    """Whether the kernels know this weight's rotation; other group sizes go through the reference."""
    return weight.rotation == 0 or weight.rotation in KERNEL_ROTATIONS
