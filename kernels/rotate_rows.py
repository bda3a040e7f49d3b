"""Rows rotated by the regular Hadamard matrix of convrot and, in the same pass, quantized to int8."""

from __future__ import annotations

from .quantize_rows import _activate, _magnitude_bits, _row_scale, _to_grid
from .runtime import tl, triton

KERNEL_ROTATIONS = (16, 64, 256)
"""Group sizes the kernel takes; a model uses 256, or 64 for narrow layers."""


@triton.jit
def _load_rows(x_ptr, group, lane, part, K: tl.constexpr, stride_m, stride_k, row, mask, ACTIVATION: tl.constexpr):
    column = group * 256 + part * 64 + lane
    x = tl.load(x_ptr + row * stride_m + column * stride_k, mask=mask, other=0.0).to(tl.float32)
    return _activate(x, ACTIVATION)


@triton.jit
def _butterfly(a, b, c, d):
    """(a, b, c, d) times the 4 x 4 regular Hadamard kernel over 2."""
    half = 0.5 * (a + b + c + d)
    return half - d, half - c, half - b, half - a


@triton.jit
def _rotate_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    hadamard_ptr,
    stride_m,
    stride_k,
    M,
    limit,
    smallest,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Groups of 256 columns: H256 = H4 x H64, four slices of 64 columns mixed in registers, then one dot with H64."""
    line = tl.arange(0, ROWS * GROUPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + line // GROUPS
    group = line % GROUPS
    lane = tl.arange(0, 64)
    mask = ((row < M) & (group < K // 256))[:, None]
    h = tl.load(hadamard_ptr + lane[:, None] * 64 + lane[None, :])
    base = x_ptr + row[:, None] * stride_m + (group[:, None] * 256 + lane[None, :]) * stride_k
    a = _activate(tl.load(base, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    b = _activate(tl.load(base + 64 * stride_k, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    c = _activate(tl.load(base + 128 * stride_k, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    d = _activate(tl.load(base + 192 * stride_k, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    a, b, c, d = _butterfly(a, b, c, d)
    a = tl.dot(a.to(h.dtype), h)
    b = tl.dot(b.to(h.dtype), h)
    c = tl.dot(c.to(h.dtype), h)
    d = tl.dot(d.to(h.dtype), h)
    target = q_ptr + row[:, None] * K + group[:, None] * 256 + lane[None, :]
    if QUANTIZE:
        bits = tl.maximum(
            tl.maximum(_magnitude_bits(a), _magnitude_bits(b)), tl.maximum(_magnitude_bits(c), _magnitude_bits(d))
        )
        largest = tl.max(tl.reshape(bits, [ROWS, GROUPS * 64]), axis=1)
        scale, inverse = _row_scale(largest, limit, smallest)
        first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(scale_ptr + first, scale, mask=first < M)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [ROWS, GROUPS]), [ROWS * GROUPS])[:, None]
        tl.store(target, _to_grid(a * inverse, True), mask=mask)
        tl.store(target + 64, _to_grid(b * inverse, True), mask=mask)
        tl.store(target + 128, _to_grid(c * inverse, True), mask=mask)
        tl.store(target + 192, _to_grid(d * inverse, True), mask=mask)
    else:
        tl.store(target, a.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(target + 64, b.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(target + 128, c.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(target + 192, d.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_rows_16x16_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    hadamard_ptr,
    stride_m,
    stride_k,
    M,
    limit,
    smallest,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Groups of 256 columns: H256 = H16 x H16, two small dots with a transpose between."""
    line = tl.arange(0, ROWS * GROUPS * 16)
    row = tl.program_id(0).to(tl.int64) * ROWS + line // (GROUPS * 16)
    column = (line % (GROUPS * 16)) * 16
    lane = tl.arange(0, 16)
    mask = ((row < M) & (column < K))[:, None]
    h = tl.load(hadamard_ptr + lane[:, None] * 16 + lane[None, :])
    base = x_ptr + row[:, None] * stride_m + (column[:, None] + lane[None, :]) * stride_k
    x = _activate(tl.load(base, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    y = tl.dot(x.to(h.dtype), h).to(h.dtype)
    y = tl.reshape(tl.permute(tl.reshape(y, [ROWS * GROUPS, 16, 16]), (0, 2, 1)), [ROWS * GROUPS * 16, 16])
    z = tl.dot(y, h)
    if QUANTIZE:
        bits = tl.reshape(_magnitude_bits(z), [ROWS, GROUPS * 256])
        largest = tl.max(bits, axis=1)
        scale, inverse = _row_scale(largest, limit, smallest)
        first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(scale_ptr + first, scale, mask=first < M)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [ROWS, GROUPS * 16]), [ROWS * GROUPS * 16])[:, None]
        z = _to_grid(z * inverse, True)
    else:
        z = z.to(q_ptr.dtype.element_ty)
    z = tl.reshape(tl.permute(tl.reshape(z, [ROWS * GROUPS, 16, 16]), (0, 2, 1)), [ROWS * GROUPS * 16, 16])
    tl.store(q_ptr + row[:, None] * K + column[:, None] + lane[None, :], z, mask=mask)
