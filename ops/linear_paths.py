"""How each path of the dispatch table multiplies: it takes scratch memory, launches kernels and writes the output."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.decode_rows import decode_rows
from ..kernels.matmul_blocks import COLUMNS_PER_WORD, ROWS_PER_TILE, block_splits, matmul_blocks
from ..kernels.matmul_decode import matmul_decode, matvec_decode
from ..kernels.matmul_rows import matmul_rows
from ..kernels.matmul_split import matmul_split, split_rows, term_count
from ..kernels.quantize_rows import apply_activation, quantize_rows, quantize_rows_reference
from ..kernels.rotate_rows import KERNEL_ROTATIONS, rotate_rows
from ..kernels.runtime import (
    ADA,
    CAN_OVERLAP,
    DESCRIPTORS_FIT,
    GEFORCE_BLACKWELL,
    HOPPER,
    INTERPRETED,
    made_to_keep,
    multiprocessor_count,
)
from ..kernels.stored_weight import FP8, INT4, INT4_CODEBOOK, INT8, MXFP8, NVFP4, StoredWeight
from .linear_kitchen import kitchen_linear
from .linear_reference import linear_reference
from .linear_table import FEW_ROWS, FP8_ROWS, INT8_ROWS, KITCHEN, SCRATCH, Gpu
from .scratch import Spec, take_scratch
from .shared_input import SharedInput, take_for_input

_log = logging.getLogger("lowbit.linear")

CHUNK_NBYTES = 512 << 20
"""Quantized activations kept in scratch at once; longer inputs are multiplied in pieces of rows."""


def _codes_spec(weight: StoredWeight, alignment: int) -> Spec:
    """The scratch that `_straight` needs: none for codes that lie row by row on the alignment."""
    return None if weight.alignment >= alignment else (tuple(weight.data.shape), weight.data.dtype)


def _straight(weight: StoredWeight, copy: torch.Tensor | None) -> StoredWeight:
    """`weight` with its codes row by row, copied into `copy` where there is one."""
    if copy is None:
        return weight
    copy.copy_(weight.data)
    return dataclasses.replace(weight, data=copy)


def _bias_like(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_ones(count: int, device: torch.device) -> torch.Tensor:
    # Copied from the host, which waits: a kernel that fills them would run on no stream of the caller's.
    return made_to_keep(lambda: torch.ones(1, count).to(device))


def _ones(count: int, device: torch.device) -> torch.Tensor:
    """(1, count) ones, kept; while a CUDA graph is captured, ones of that graph, which only its replay writes."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.ones(1, count, device=device)
    return _kept_ones(count, device)


def _hardware_e4m3(gpu: Gpu) -> bool:
    return gpu.cc >= ADA and not INTERPRETED


# --- the weight decoded into scratch


def scratch_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu, group: str = ""
) -> torch.Tensor:
    """Decode the weight into scratch as x's dtype and let cuBLAS multiply; x of any rank and strides."""
    decoded, codes = take_scratch(x.device, ((weight.rows, weight.columns), x.dtype), _codes_spec(weight, 1))
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


def _few_rows_splits(method: str, weight: StoredWeight, device: torch.device) -> int:
    if method == "matvec":
        return 1
    if method == "blocks":
        return block_splits(weight.columns)
    return _choose_splits(-(-weight.rows // (32 if method == "decode" else 64)), weight.data.shape[1], device)


def _few_rows_method(weight: StoredWeight, rows: int, dtype: torch.dtype, activation: str | None, gpu: Gpu) -> str:
    if weight.kind == INT4_CODEBOOK:
        return "blocks"
    if dtype == torch.float32:
        return "matvec"
    if weight.kind == NVFP4 and weight.alignment >= 8:
        return "blocks"
    if weight.kind == FP8 and rows == 1 and activation is None:
        return "matvec"
    if weight.kind in (INT8, INT4) or (weight.kind == FP8 and gpu.cc >= ADA):
        return "split"
    return "matvec" if rows <= 2 else "decode"


class _FewRowsScratch(NamedTuple):
    """What a product of few rows needs besides its output; None where its method does without."""

    rotated: torch.Tensor | None
    q: torch.Tensor | None
    row_scale: torch.Tensor | None
    partial: torch.Tensor | None
    codes: torch.Tensor | None


def _few_rows_scratch(method: str, x: torch.Tensor, weight: StoredWeight, splits: int) -> _FewRowsScratch:
    rows, columns = x.shape
    integer = weight.kind != FP8
    split = method == "split"
    q_shape = (term_count(x.dtype, integer) if split else 0, rows, columns)
    return _FewRowsScratch(
        *take_scratch(
            x.device,
            # A rotated row can be 16 times as large as x, which is more than float16 holds.
            ((rows, columns), torch.float32 if x.dtype == torch.float16 else x.dtype) if weight.rotation else None,
            (q_shape, torch.int8 if integer else torch.float8_e4m3fn) if split else None,
            ((rows,), torch.float32) if split else None,
            ((splits, rows, weight.rows), torch.float32) if splits > 1 or method == "blocks" else None,
            _codes_spec(weight, 8 if weight.kind == INT4_CODEBOOK else 1),
        )
    )


def few_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu, group: str = ""
) -> torch.Tensor:
    """Multiply a few rows straight from the stored codes."""
    if weight.kind == INT4_CODEBOOK and weight.group != COLUMNS_PER_WORD:
        return scratch_linear(x, weight, bias, activation, gpu)
    x = x.reshape(-1, weight.columns)
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    method = _few_rows_method(weight, x.shape[0], x.dtype, activation, gpu)
    splits = _few_rows_splits(method, weight, x.device)
    scratch = _few_rows_scratch(method, x, weight, splits)
    weight = _straight(weight, scratch.codes)
    if weight.rotation:
        rotate_rows(x, scratch.rotated, None, weight.rotation, activation)
        x, activation = scratch.rotated, None
    if method == "split":
        _multiply_split(x, weight, bias, activation, gpu, out, scratch, splits)
    elif method == "blocks":
        _multiply_blocks(x, weight, bias, activation, gpu, out, scratch, splits)
    else:
        _multiply_decoded(method, apply_activation(x, activation), weight, bias, gpu, out, scratch, splits)
    return out


def _overlaps(gpu: Gpu) -> bool:
    return CAN_OVERLAP and not INTERPRETED and gpu.cc >= HOPPER


def _split_tile(lines: int, weight: StoredWeight, splits: int, gpu: Gpu) -> tuple[int, int]:
    """(bytes of a row in a step, steps in flight) for `lines` split rows, as measured on an H200."""
    if lines > 64:
        return 128, 2
    if gpu.cc[0] != HOPPER[0]:
        return 128, 3
    one_row = lines <= 2 and splits == 1
    return (128, 6) if one_row or weight.kind == INT4 else (256, 4)


def _multiply_split(x, weight, bias, activation, gpu, out, scratch, splits) -> None:
    """x as a sum of 8-bit terms, each multiplied with the stored codes on 8-bit tensor cores."""
    overlap = _overlaps(gpu)
    planes = 2 if weight.kind == INT4 else 1
    split_rows(x, scratch.q, scratch.row_scale, activation, planes=planes, overlap=overlap)
    terms, rows, _ = scratch.q.shape
    step, stages = _split_tile(terms * rows, weight, splits, gpu)
    options: dict[str, Any] = {"splits": splits, "assembly": not INTERPRETED, "overlap": overlap}
    options |= {"step": step, "stages": stages}
    matmul_split(scratch.q, scratch.row_scale, weight, bias, out, scratch.partial, **options)


def _multiply_blocks(x, weight, bias, activation, gpu, out, scratch, splits) -> None:
    """4-bit codes decoded sixteen at a time, in as many parts of K as `splits`."""
    options: dict[str, Any] = {"assembly": not INTERPRETED, "hardware_e4m3": _hardware_e4m3(gpu)}
    options |= {"tiles": _tiles_per_program(weight, splits, x.device), "activation": activation}
    matmul_blocks(x, weight, bias, out, scratch.partial, overlap=_overlaps(gpu), **options)


def _tiles_per_program(weight: StoredWeight, splits: int, device: torch.device) -> int:
    """Two, as long as two programs meet on every multiprocessor."""
    programs = splits * -(-weight.rows // ROWS_PER_TILE)
    return 2 if programs >= 4 * multiprocessor_count(device.index or 0) else 1


def _multiply_decoded(method, x, weight, bias, gpu, out, scratch, splits) -> None:
    """Codes decoded in registers: sums along K for one or two rows ("matvec"), else 16-bit tensor cores ("decode")."""
    hardware = _hardware_e4m3(gpu)
    as_bytes = weight.code_name in ("e5m2", "e2m1", "int4") or (not hardware and weight.kind in (FP8, MXFP8))
    stored = weight.data.view(torch.uint8) if as_bytes else weight.data
    if method == "matvec":
        matvec_decode(x, weight, stored, bias, out, hardware_e4m3=hardware)
        return
    options: dict[str, Any] = {"splits": splits, "hardware_e4m3": hardware, "assembly": not INTERPRETED}
    matmul_decode(x, weight, stored, bias, out, scratch.partial, **options)


# --- 8-bit products


def _row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of equal pieces whose quantized rows stay under `CHUNK_NBYTES`."""
    if rows * columns <= CHUNK_NBYTES:
        return [(0, rows)]
    pieces = -(-rows * columns // CHUNK_NBYTES)
    size = -(-rows // pieces // 128) * 128
    size = max(size, -(-rows // pieces))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _pieces(
    chunks: list[tuple[int, int]], x: torch.Tensor, q: torch.Tensor, row_scale: torch.Tensor, out: torch.Tensor
) -> Iterable[tuple[torch.Tensor, ...]]:
    """(x, q, row_scale, out) of each piece of rows; q is one piece long."""
    if len(chunks) == 1:
        return ((x, q, row_scale, out),)
    return ((x[a:b], q[: b - a], row_scale[a:b], out[a:b]) for a, b in chunks)


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


def _has_room_for_descriptors(gpu: Gpu) -> bool:
    """GeForce Blackwell (12.x) has tensor descriptors, but not the shared memory that their tiles take: 99 KiB, not 227."""
    return DESCRIPTORS_FIT and HOPPER <= gpu.cc < GEFORCE_BLACKWELL


def _takes_scaled_mm(out: torch.Tensor, n: int, k: int) -> bool:
    return out.dtype == torch.bfloat16 and n % 16 == 0 and k % 16 == 0 and out.is_cuda


def _fp8_matmul(
    q: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gpu: Gpu,
) -> bool:
    """(q @ codes.T) x scales + bias into `out`, by cuBLAS where it takes the call; False where nothing does."""
    n, k = codes.shape
    if _takes_scaled_mm(out, n, k) and (gpu.cc, codes.dtype) not in _scaled_mm_refused:
        columns = _ones(n, out.device) if column_scale is None else column_scale.view(1, n)
        try:
            torch._scaled_mm(
                q,
                codes.t(),
                row_scale,
                columns,
                bias=_bias_like(bias, out.dtype),
                out_dtype=out.dtype,
                use_fast_accum=True,
                out=out,
            )
        except _FATAL:
            raise
        except (RuntimeError, ValueError) as error:
            _scaled_mm_failed(error, gpu, codes.dtype)
        else:
            return True
    if not gpu.triton:
        return False
    column_scale = _ones(1, out.device).view(1) if column_scale is None else column_scale
    matmul_rows(q, codes, row_scale, column_scale, bias, out, descriptors=_has_room_for_descriptors(gpu))
    return True


def fp8_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu, group: str = ""
) -> torch.Tensor:
    """Quantize x to e4m3 row by row and multiply with FP8 codes; mxfp8 and nvfp4 become e4m3 with a scale per row."""
    if not gpu.triton and (gpu.cc, weight.data.dtype) in _scaled_mm_refused:
        return linear_reference(x, weight, bias, fast=False, activation=activation)
    float8 = torch.float8_e4m3fn
    source, x = x, x.reshape(-1, weight.columns)
    rows, columns = x.shape
    count = weight.rows
    blocks = weight.kind in (MXFP8, NVFP4)
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    chunks = _row_chunks(rows, columns)
    shared = SharedInput.of(source, group, float8, activation) if len(chunks) == 1 else None
    folded = weight.scale if weight.scale_mode == 1 and not blocks else None
    scratch = take_for_input(
        x.device,
        shared,
        ((chunks[0][1] - chunks[0][0], columns), float8),
        ((rows, 1), torch.float32),
        ((rows, 1), torch.float32) if shared and folded is not None else None,
        ((count, columns), float8) if blocks else None,
        ((count,), torch.float32) if blocks else None,
        _codes_spec(weight, 1 if blocks else 16),
    )
    q, row_scale, scaled, decoded, decoded_scale, codes = scratch.tensors
    weight = _straight(weight, codes)
    column_scale = weight.scale if weight.scale_mode == 2 else None
    if blocks:
        data, column_scale = decoded, decoded_scale
        decode_rows(weight, data, column_scale, hardware_e4m3=_hardware_e4m3(gpu))
    else:
        data = weight.data
    quantize = quantize_rows if gpu.triton else _quantize_without_triton
    for piece, part, scale, target in _pieces(chunks, x, q, row_scale, out):
        if not scratch.quantized:
            quantize(piece, part, scale, activation, folded if scaled is None else None)
        if scaled is not None:
            scale = torch.mul(scale, folded, out=scaled)
        if not _fp8_matmul(part, data, scale, column_scale, bias, target, gpu):
            return linear_reference(x, weight, bias, fast=False, activation=activation)
    scratch.keep()
    return out


def _quantize_without_triton(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, activation: str | None, folded: torch.Tensor | None
) -> None:
    quantized, row_scale = quantize_rows_reference(x, q.dtype, 0, activation)
    q.copy_(quantized)
    scale.view(-1).copy_(row_scale if folded is None else row_scale * folded)


def int8_rows_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None, gpu: Gpu, group: str = ""
) -> torch.Tensor:
    """Rotate (convrot) and quantize x to int8 row by row, multiply with the int8 grid of an integer weight."""
    source, x = x, x.reshape(-1, weight.columns)
    rows, columns = x.shape
    count = weight.rows
    decodes = weight.kind != INT8
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    chunks = _row_chunks(rows, columns)
    shared = SharedInput.of(source, group, torch.int8, weight.rotation, activation) if len(chunks) == 1 else None
    scratch = take_for_input(
        x.device,
        shared,
        ((chunks[0][1] - chunks[0][0], columns), torch.int8),
        ((rows, 1), torch.float32),
        ((count, columns), torch.int8) if decodes else None,
        _codes_spec(weight, 1 if decodes else 16),
    )
    q, row_scale, decoded, codes = scratch.tensors
    weight = _straight(weight, codes)
    data = weight.data
    if decodes:
        data = decoded
        decode_rows(weight, data, hardware_e4m3=_hardware_e4m3(gpu))
    for piece, part, scale, target in _pieces(chunks, x, q, row_scale, out):
        if not scratch.quantized and weight.rotation:
            rotate_rows(piece, part, scale, weight.rotation, activation)
        elif not scratch.quantized:
            quantize_rows(piece, part, scale, activation)
        matmul_rows(part, data, scale, weight.scale, bias, target, descriptors=_has_room_for_descriptors(gpu))
    scratch.keep()
    return out


LINEAR_PATHS: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        SCRATCH: scratch_linear,
        FEW_ROWS: few_rows_linear,
        FP8_ROWS: fp8_rows_linear,
        INT8_ROWS: int8_rows_linear,
        KITCHEN: kitchen_linear,
    }
)


def kernels_take(rotation: int) -> bool:
    """Whether the kernels know a rotation of this group size; weights with another go through the reference."""
    return rotation == 0 or rotation in KERNEL_ROTATIONS
