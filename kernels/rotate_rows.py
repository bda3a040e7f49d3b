"""Rows rotated by the regular Hadamard matrix of convrot and, in the same pass, quantized to int8."""

from __future__ import annotations

import functools

import torch

from .hadamard import hadamard
from .launch import Launcher
from .quantize_rows import LIMITS, SMALLEST_SCALE, _activate, _magnitude_bits, _row_scale, _to_grid
from .runtime import INTERPRETED, made_to_keep, tl, triton

KERNEL_ROTATIONS = (16, 64, 256)
"""Group sizes the kernels take; models use 256, or 64 for narrow layers."""


@functools.lru_cache(maxsize=32)
def rotation_factors(group: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two symmetric 16 x 16 matrices (outer, inner) whose Kronecker product rotates 256 / group groups at once."""
    inner = hadamard(16, torch.device("cpu"), torch.float64)
    outer = {
        256: lambda: inner,
        64: lambda: torch.kron(torch.eye(4, dtype=torch.float64), hadamard(4, torch.device("cpu"), torch.float64)),
        16: lambda: torch.eye(16, dtype=torch.float64),
    }[group]()
    return made_to_keep(lambda: (_placed(outer, device, dtype), _placed(inner, device, dtype)))


def _placed(matrix: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return matrix.to(device=device, dtype=dtype).contiguous()


@triton.jit
def _rotated(x_row, first, outer, inner, stride_k, K: tl.constexpr, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr):
    """GROUPS x 256 columns from `first`, rotated, as (GROUPS x 16, 16) with the last two digits of 16 swapped."""
    column = first + tl.arange(0, GROUPS * 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = _activate(tl.load(x_row + column * stride_k, mask=column < K, other=0.0).to(tl.float32), ACTIVATION)
    y = tl.dot(x.to(inner.dtype), inner).to(inner.dtype)
    y = tl.reshape(tl.permute(tl.reshape(y, [GROUPS, 16, 16]), (0, 2, 1)), [GROUPS * 16, 16])
    return tl.dot(y, outer)


@triton.jit
def _store_rotated(q_row, z, first, K: tl.constexpr, GROUPS: tl.constexpr):
    column = first + tl.arange(0, GROUPS * 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    z = tl.reshape(tl.permute(tl.reshape(z, [GROUPS, 16, 16]), (0, 2, 1)), [GROUPS * 16, 16])
    tl.store(q_row + column, z, mask=column < K)


@triton.jit
def _rotate_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    outer_ptr,
    inner_ptr,
    stride_m,
    stride_k,
    limit,
    smallest,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One row a program, in HEAD + TAIL pieces of 256 columns (powers of two; TAIL may be 0).

    A rotation of 256 is two small dots with a transpose between. QUANTIZE False: the rotated row in q's own dtype.
    """
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 16)
    outer = tl.load(outer_ptr + digit[:, None] * 16 + digit[None, :])
    inner = tl.load(inner_ptr + digit[:, None] * 16 + digit[None, :])
    x_row = x_ptr + row * stride_m
    q_row = q_ptr + row * K
    head = _rotated(x_row, 0, outer, inner, stride_k, K, HEAD, ACTIVATION)
    if TAIL > 0:
        tail = _rotated(x_row, HEAD * 256, outer, inner, stride_k, K, TAIL, ACTIVATION)
    if QUANTIZE:
        largest = tl.max(tl.max(_magnitude_bits(head), axis=1), axis=0)
        if TAIL > 0:
            largest = tl.maximum(largest, tl.max(tl.max(_magnitude_bits(tail), axis=1), axis=0))
        scale, inverse = _row_scale(largest, limit, smallest)
        tl.store(scale_ptr + row, scale)
        _store_rotated(q_row, _to_grid(head * inverse, True), 0, K, HEAD)
        if TAIL > 0:
            _store_rotated(q_row, _to_grid(tail * inverse, True), HEAD * 256, K, TAIL)
    else:
        _store_rotated(q_row, head.to(q_ptr.dtype.element_ty), 0, K, HEAD)
        if TAIL > 0:
            _store_rotated(q_row, tail.to(q_ptr.dtype.element_ty), HEAD * 256, K, TAIL)


def head_and_tail(columns: int) -> tuple[int, int]:
    """Powers of two that together cover ceil(columns / 256) pieces; the tail is 0 where it would save under a fifth."""
    pieces = -(-columns // 256)
    whole = 1 << (pieces - 1).bit_length()
    head = 1 << (pieces.bit_length() - 1)
    rest = pieces - head
    tail = 1 << (rest - 1).bit_length() if rest else 0
    return (head, tail) if head + tail <= 0.8 * whole else (whole, 0)


def rotate_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    rotation: int,
    activation: str | None = None,
) -> None:
    """Rotate x (M, K), of any strides, into the row-major `out`: int8 with `scale` (M,) written, or a float dtype.

    Args:
        x: float16, bfloat16 or float32; K a multiple of `rotation`.
        out: (M, K) int8, or float16, bfloat16, float32 (then scale is None).
        scale: float32, written.
        rotation: group size, one of `KERNEL_ROTATIONS`.
        activation: applied to x first.
    """
    # float16's range is too short for sums of 16, so only bfloat16 takes the 16-bit dots; tf32 serves the others.
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    outer, inner = rotation_factors(rotation, x.device, dtype)
    launcher = _rotating(x.shape, x.stride(), activation, scale is not None)
    launcher(x, out, outer if scale is None else scale, outer, inner)


@functools.lru_cache(maxsize=1024)
def _rotating(
    shape: tuple[int, int],
    strides: tuple[int, int],
    activation: str | None,
    quantizes: bool,
) -> Launcher:
    rows, columns = shape
    head, tail = head_and_tail(columns)
    return Launcher(
        _rotate_rows_kernel,
        (rows, 1, 1),
        (*strides, LIMITS[torch.int8], SMALLEST_SCALE),
        {"K": columns, "HEAD": head, "TAIL": tail, "QUANTIZE": quantizes, "ACTIVATION": activation},
        warps=2 if head <= 16 else 4 if head <= 32 or tail == 0 else 8,
    )
