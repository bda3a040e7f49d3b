"""Weight-only matmul for few rows of x: the stored weight is decoded inside the kernel, read once, and never written."""

from __future__ import annotations

import torch

from .decode_tiles import (
    code_to_float32,
    e2m1_pairs,
    e4m3_to_float32,
    e8m0_to_float32,
    int4_pairs,
    swizzled_offset,
)
from .launch import launch
from .runtime import ceil_div, power_of_two, tl, triton
from .stored_weight import PACKED_KINDS, StoredWeight


@triton.jit
def _store_rows(
    out_ptr, acc, m, n, M, N, stride_out, scale_ptr, bias_ptr, factor, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """acc (n, m) x scale (+ bias) to out (m, n). SCALE: 0 none, 1 one for all, 2 one per row of W."""
    acc = acc * factor
    if SCALE == 2:
        acc = acc * tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    elif SCALE == 1:
        acc = acc * tl.load(scale_ptr)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _decode_matvec_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    block_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_out,
    tiles_per_row,
    K: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One or two rows of x, by fused multiply-adds in float32. BLOCK_K counts stored bytes (two columns, if packed)."""
    PACKED: tl.constexpr = KIND == "e2m1" or KIND == "int4"
    GROUP: tl.constexpr = 8 if KIND == "e2m1" else (32 if KIND == "mxfp8" else 1)
    # Neighbours are added up at once, so that few accumulators leave room for many loads in flight.
    TOGETHER: tl.constexpr = GROUP if GROUP > 1 else 16
    BYTES: tl.constexpr = (K + 1) // 2 if PACKED else K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    safe_n = tl.where(inside_n, n, 0)
    lane = tl.arange(0, BLOCK_K)
    w_row = w_ptr + safe_n.to(tl.int64)[:, None] * stride_wn + lane[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K // TOGETHER], dtype=tl.float32)
    acc_two = tl.zeros([BLOCK_N, BLOCK_K // TOGETHER], dtype=tl.float32)
    LENGTH: tl.constexpr = ((BYTES + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)) * BLOCK_K
    for step in tl.range(0, LENGTH, BLOCK_K, num_stages=STAGES):
        start = step + tl.program_id(1) * LENGTH
        if BYTES % (BLOCK_K * SPLITS) == 0:
            code = tl.load(w_row + start, eviction_policy="evict_first")
        else:
            code = tl.load(w_row + start, mask=(lane < BYTES - start)[None, :], other=0.0)
        if PACKED:
            if KIND == "e2m1":
                even, odd = e2m1_pairs(code, tl.float32, False)
            else:
                even, odd = int4_pairs(code, tl.float32)
            column = start * 2 + tl.arange(0, BLOCK_K * 2)
            x = tl.load(x_ptr + column * stride_xk, mask=column < K, other=0.0).to(tl.float32)
            x_even, x_odd = tl.split(tl.reshape(x, [BLOCK_K, 2]))
            part = even * x_even[None, :] + odd * x_odd[None, :]
            if TWO_ROWS:
                x = tl.load(x_ptr + stride_xm + column * stride_xk, mask=column < K, other=0.0).to(tl.float32)
                x_even, x_odd = tl.split(tl.reshape(x, [BLOCK_K, 2]))
                part_two = even * x_even[None, :] + odd * x_odd[None, :]
        else:
            w = code_to_float32(code, KIND, HARDWARE_E4M3)
            column = start + lane
            x = tl.load(x_ptr + column * stride_xk, mask=column < K, other=0.0).to(tl.float32)
            part = w * x[None, :]
            if TWO_ROWS:
                x = tl.load(x_ptr + stride_xm + column * stride_xk, mask=column < K, other=0.0).to(tl.float32)
                part_two = w * x[None, :]
        if GROUP > 1:
            block = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            offset = swizzled_offset(safe_n[:, None], block[None, :], tiles_per_row)
            stored = tl.load(block_scale_ptr + offset, mask=(block < (BYTES + GROUP - 1) // GROUP)[None, :], other=0)
            block_scale = e8m0_to_float32(stored) if KIND == "mxfp8" else e4m3_to_float32(stored)
            acc += block_scale * tl.sum(tl.reshape(part, [BLOCK_N, BLOCK_K // GROUP, GROUP]), axis=2)
            if TWO_ROWS:
                acc_two += block_scale * tl.sum(tl.reshape(part_two, [BLOCK_N, BLOCK_K // GROUP, GROUP]), axis=2)
        else:
            acc += tl.sum(tl.reshape(part, [BLOCK_N, BLOCK_K // TOGETHER, TOGETHER]), axis=2)
            if TWO_ROWS:
                acc_two += tl.sum(tl.reshape(part_two, [BLOCK_N, BLOCK_K // TOGETHER, TOGETHER]), axis=2)
    m = tl.arange(0, 1)
    out = out_ptr + tl.program_id(1).to(tl.int64) * M * stride_out
    total = tl.sum(acc, axis=1)[:, None]
    _store_rows(out, total, m, n, M, N, stride_out, scale_ptr, bias_ptr, 1.0, SCALE, HAS_BIAS)
    if TWO_ROWS:
        total = tl.sum(acc_two, axis=1)[:, None]
        _store_rows(out, total, m + 1, n, M, N, stride_out, scale_ptr, bias_ptr, 1.0, SCALE, HAS_BIAS)


@triton.jit
def _decode_matmul_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    block_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_out,
    tiles_per_row,
    K: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """BLOCK_M rows of x by 16-bit dots, W as the left operand. BLOCK_K counts stored bytes (two columns, if packed)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PACKED: tl.constexpr = KIND == "e2m1"
    GROUP: tl.constexpr = 8 if KIND == "e2m1" else (32 if KIND == "mxfp8" else 1)
    BYTES: tl.constexpr = (K + 1) // 2 if PACKED else K
    LENGTH: tl.constexpr = ((BYTES + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)) * BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_n = tl.where(n < N, n, 0)
    safe_m = tl.where(m < M, m, 0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    w_row = w_ptr + safe_n.to(tl.int64)[:, None] * stride_wn + lane[None, :]
    x_row = x_ptr + safe_m[None, :] * stride_xm
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(0, LENGTH, BLOCK_K):
        start = step + tl.program_id(1) * LENGTH
        if BYTES % (BLOCK_K * SPLITS) == 0:
            code = tl.load(w_row + start)
        else:
            code = tl.load(w_row + start, mask=(lane < BYTES - start)[None, :], other=0.0)
        if GROUP > 1:
            block = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            offset = swizzled_offset(safe_n[:, None], block[None, :], tiles_per_row)
            stored = tl.load(block_scale_ptr + offset, mask=(block < (BYTES + GROUP - 1) // GROUP)[None, :], other=0)
            if KIND == "mxfp8":
                block_scale = e8m0_to_float32(stored)
            elif ASSEMBLY and tl.bfloat16 == DTYPE:
                block_scale = e4m3_to_float32(stored) * 3.3230699894622897e35  # 2 ** 118
            elif ASSEMBLY and tl.float16 == DTYPE:
                block_scale = e4m3_to_float32(stored) * 128.0
            else:
                block_scale = e4m3_to_float32(stored)
            block_scale = tl.broadcast_to(block_scale[:, :, None], [BLOCK_N, BLOCK_K // GROUP, GROUP])
            block_scale = tl.reshape(block_scale, [BLOCK_N, BLOCK_K])
        if PACKED:
            column = (start + lane) * 2
            x_even = tl.load(x_row + column[:, None] * stride_xk, mask=(column < K)[:, None], other=0.0)
            x_odd = tl.load(x_row + (column + 1)[:, None] * stride_xk, mask=(column + 1 < K)[:, None], other=0.0)
            even, odd = e2m1_pairs(code, DTYPE, ASSEMBLY)
            even = even * block_scale.to(DTYPE)
            odd = odd * block_scale.to(DTYPE)
            acc = tl.dot(even, x_even, acc)
            acc = tl.dot(odd, x_odd, acc)
        else:
            column = start + lane
            x = tl.load(x_row + column[:, None] * stride_xk, mask=(column < K)[:, None], other=0.0)
            if GROUP > 1:
                w = (code_to_float32(code, KIND, HARDWARE_E4M3) * block_scale).to(DTYPE)
            else:
                w = code_to_float32(code, KIND, HARDWARE_E4M3).to(DTYPE)
            acc = tl.dot(w, x, acc)
    factor = 1.0
    if KIND == "e2m1" and ASSEMBLY and tl.bfloat16 == DTYPE:
        factor = 256.0
    elif KIND == "e2m1" and ASSEMBLY and tl.float16 == DTYPE:
        factor = 128.0
    out = out_ptr + tl.program_id(1).to(tl.int64) * M * stride_out
    _store_rows(out, acc, m, n, M, N, stride_out, scale_ptr, bias_ptr, factor, SCALE, HAS_BIAS)


@triton.jit
def prefetch_lines(places):
    """Ask for the lines of these places in the L2 cache, also while a kernel may still write them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_out,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds the (SPLITS, M, N) float32 partial products of one row, in a fixed order."""
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for split in tl.static_range(SPLITS):
        source = partial_ptr + (split * M + tl.program_id(1)).to(tl.int64) * N + n
        total += tl.load(source, mask=n < N, other=0.0)
    _store_rows(out_ptr, total[:, None], m, n, M, N, stride_out, scale_ptr, bias_ptr, 1.0, SCALE, HAS_BIAS)


def sum_splits(
    partial: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    overlap: bool = False,
) -> None:
    """Add partial (splits, M, N) float32 up, scale it by the weight's scale, add the bias, store as out (M, N).

    overlap: the kernel before lets this one start while it runs (cc 9.0): start, then wait for it.
    """
    splits, rows, columns = partial.shape
    launch(
        _sum_splits_kernel,
        (ceil_div(columns, 256), rows, 1),
        (
            partial,
            partial if weight.scale is None else weight.scale,
            partial if bias is None else bias,
            out,
            rows,
            columns,
            out.stride(0),
        ),
        {
            "SPLITS": splits,
            "SCALE": weight.scale_mode,
            "HAS_BIAS": bias is not None,
            "BLOCK_N": 256,
            "OVERLAP": overlap,
        },
        overlap=overlap,
    )


def _operands(
    x: torch.Tensor, weight: StoredWeight, codes: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> tuple:
    """What both kernels here take besides constants: what they do not read is another tensor of the call."""
    return (
        x,
        codes,
        codes if weight.scale is None else weight.scale,
        codes if weight.block_scale is None else weight.block_scale,
        out if bias is None else bias,
        out,
        x.shape[0],
        weight.rows,
        x.stride(0),
        x.stride(1),
        codes.stride(0),
        out.stride(-2),
        weight.scale_tiles_per_row,
    )


def matvec_decode(
    x: torch.Tensor,
    weight: StoredWeight,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    hardware_e4m3: bool,
) -> None:
    """Weight-only product of one or two rows of x and any kind but int4_codebook, by float32 multiply-adds.

    Args:
        x: (1 or 2, K), any strides.
        weight: in whatever basis x is.
        codes: its data, as bytes where `hardware_e4m3` is False.
        bias: (N,) or None.
        out: (1 or 2, N), last stride 1, written.
        hardware_e4m3: the GPU converts e4m3 (cc 8.9 and later).
    """
    wide = weight.rows >= 8192 and weight.columns <= 8192
    block_n, block_k = (4, 1024) if not wide else (16, 512) if x.shape[0] == 1 else (8, 1024)
    if weight.kind in PACKED_KINDS:
        block_k //= 2
    launch(
        _decode_matvec_kernel,
        (ceil_div(weight.rows, block_n), 1, 1),
        _operands(x, weight, codes, bias, out),
        {
            "K": weight.columns,
            "TWO_ROWS": x.shape[0] == 2,
            "KIND": weight.code_name,
            "SCALE": weight.scale_mode,
            "HAS_BIAS": bias is not None,
            "HARDWARE_E4M3": hardware_e4m3,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "SPLITS": 1,
            "STAGES": 1,
        },
    )


def matmul_decode(
    x: torch.Tensor,
    weight: StoredWeight,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    *,
    splits: int,
    hardware_e4m3: bool,
    assembly: bool,
) -> None:
    """Weight-only product of x (M, K) and an fp8, mxfp8 or nvfp4 weight into `out` (M, N), by 16-bit dots.

    As `matvec_decode`, with `partial` (splits, M, N) float32 work space for splits > 1.
    """
    rows = x.shape[0]
    single = splits == 1
    target = out if single else partial
    block_m = min(max(16, power_of_two(rows)), 64)
    packed = weight.kind in PACKED_KINDS
    launch(
        _decode_matmul_kernel,
        (ceil_div(weight.rows, 32), splits, ceil_div(rows, block_m)),
        _operands(x, weight, codes, bias, target),
        {
            "K": weight.columns,
            "KIND": weight.code_name,
            "SCALE": weight.scale_mode if single else 0,
            "HAS_BIAS": bias is not None and single,
            "HARDWARE_E4M3": hardware_e4m3,
            "ASSEMBLY": assembly,
            "BLOCK_M": block_m,
            "BLOCK_N": 32,
            "BLOCK_K": 128 if packed else 256,
            "SPLITS": splits,
        },
        warps=4,
        stages=4 if block_m <= 16 else 2,
    )
    if not single:
        sum_splits(partial, weight, bias, out)
