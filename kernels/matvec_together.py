"""One row times several weights in one launch: query, key and value, or gate and up with their activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .decode_tiles import code_to_float32
from .launch import launch
from .quantize_rows import activate
from .runtime import ceil_div, constexpr, tl, triton

MOST_WEIGHTS = 3
PLAIN = "plain"
"""The kind of a weight that is stored as numbers of 16 or 32 bits."""

# Four int8 to four float32: a byte with its sign bit turned is put below the exponent of 2^23, then 2^23 + 128 is taken
# off. The conversion that the compiler takes runs at a quarter of this rate.
_INT8_ASM = constexpr("""
{
.reg .b32 t, u;
.reg .f32 f;
xor.b32 t, $4, 0x80808080;
prmt.b32 u, t, 0x4B000000, 0x7540;
mov.b32 f, u;
sub.f32 $0, f, 0f4B000080;
prmt.b32 u, t, 0x4B000000, 0x7541;
mov.b32 f, u;
sub.f32 $1, f, 0f4B000080;
prmt.b32 u, t, 0x4B000000, 0x7542;
mov.b32 f, u;
sub.f32 $2, f, 0f4B000080;
prmt.b32 u, t, 0x4B000000, 0x7543;
mov.b32 f, u;
sub.f32 $3, f, 0f4B000080;
}
""")


@triton.jit
def _row_sums(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    n,
    N,
    stride_w,
    K: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_N,) float32: rows n of the weight times x, scaled, with the bias."""
    TOGETHER: tl.constexpr = 16
    BLOCK_N: tl.constexpr = n.shape[0]
    safe_n = tl.where(n < N, n, 0)
    lane = tl.arange(0, BLOCK_K)
    w_row = w_ptr + safe_n.to(tl.int64)[:, None] * stride_w + lane[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K // TOGETHER], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            code = tl.load(w_row + start, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + lane)
        else:
            code = tl.load(w_row + start, mask=(lane < K - start)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + lane, mask=lane < K - start, other=0.0)
        if KIND == "int8" and ASSEMBLY:
            w = tl.inline_asm_elementwise(_INT8_ASM, "=f,=f,=f,=f,r", [code], dtype=tl.float32, is_pure=True, pack=4)
        else:
            w = code_to_float32(code, KIND, True)
        part = w * x.to(tl.float32)[None, :]
        acc += tl.sum(tl.reshape(part, [BLOCK_N, BLOCK_K // TOGETHER, TOGETHER]), axis=2)
    total = tl.sum(acc, axis=1)
    if SCALE == 2:
        total = total * tl.load(scale_ptr + safe_n)
    elif SCALE == 1:
        total = total * tl.load(scale_ptr)
    if HAS_BIAS:
        total += tl.load(bias_ptr + safe_n).to(tl.float32)
    return total


@triton.jit(do_not_specialize=("N", "N_1", "N_2"))  # which go from one weight's to the next one's
def _matvec_together_kernel(
    x_ptr,
    w_ptr,
    w_ptr_1,
    w_ptr_2,
    scale_ptr,
    scale_ptr_1,
    scale_ptr_2,
    bias_ptr,
    bias_ptr_1,
    bias_ptr_2,
    out_ptr,
    N,
    N_1,
    N_2,
    stride_w,
    stride_w_1,
    stride_w_2,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every program makes BLOCK_N outputs of one weight; with GATE, of both, and their product."""
    element: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    if GATE is not None:
        n = tile * BLOCK_N + lane
        gate = _row_sums(x_ptr, w_ptr, scale_ptr, bias_ptr, n, N, stride_w, K, KIND, SCALE, HAS_BIAS, ASSEMBLY, BLOCK_K)
        up = _row_sums(
            x_ptr, w_ptr_1, scale_ptr_1, bias_ptr_1, n, N, stride_w_1, K, KIND, SCALE, HAS_BIAS, ASSEMBLY, BLOCK_K
        )
        gate = activate(gate.to(element).to(tl.float32), GATE).to(element).to(tl.float32)
        tl.store(out_ptr + n, (gate * up.to(element).to(tl.float32)).to(element), mask=n < N)
    else:
        # One weight after the other: a program that lies beyond the tiles of a weight goes on to the next.
        if COUNT > 1:
            beyond = tile - tl.cdiv(N, BLOCK_N)
            if beyond >= 0:
                tile = beyond
                w_ptr, scale_ptr, bias_ptr, stride_w = w_ptr_1, scale_ptr_1, bias_ptr_1, stride_w_1
                out_ptr += N
                N = N_1
                if COUNT > 2:
                    beyond = tile - tl.cdiv(N, BLOCK_N)
                    if beyond >= 0:
                        tile = beyond
                        w_ptr, scale_ptr, bias_ptr, stride_w = w_ptr_2, scale_ptr_2, bias_ptr_2, stride_w_2
                        out_ptr += N
                        N = N_2
        n = tile * BLOCK_N + lane
        total = _row_sums(
            x_ptr, w_ptr, scale_ptr, bias_ptr, n, N, stride_w, K, KIND, SCALE, HAS_BIAS, ASSEMBLY, BLOCK_K
        )
        tl.store(out_ptr + n, total.to(element), mask=n < N)


def matvec_together(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    *,
    kind: str,
    gate: str | None = None,
    assembly: bool,
    tile: tuple[int, int, int] | None = None,
) -> None:
    """x @ weight.T x scale + bias of every weight, one after the other in `out`; or act(first) * second.

    Args:
        x: (K,) or (1, K) contiguous.
        weights: up to `MOST_WEIGHTS` (N_i, K), last stride 1, of one dtype: int8, float8_e4m3fn, or (plain) x's or
            another floating dtype.
        scales: float32, one element or (N_i,), all alike; None for plain weights.
        biases: (N_i,), all there or all None.
        out: contiguous, the sum of N_i elements, written; with `gate` N_0 of them.
        kind: "int8", "e4m3" or `PLAIN`.
        gate: "silu" or "gelu_tanh": two weights of one shape, of which the first goes through the activation.
        assembly: compiled for a GPU (the interpreter has no inline assembly).
        tile: outputs of a program, columns that are loaded together, warps.
    """
    columns = x.shape[-1]
    count = len(weights)
    rows = [weight.shape[0] for weight in weights]
    block_n, block_k, warps = tile or choose_tile(sum(rows), columns, weights[0].element_size())
    tiles = [ceil_div(n, block_n) for n in rows]

    def padded(parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        filled = [x if part is None else part for part in parts]
        return filled + [filled[0]] * (MOST_WEIGHTS - count)

    # A weight of one row has one scale either way: the others tell which it is.
    per_row = any(scale is not None and scale.numel() > 1 for scale in scales)
    launch(
        _matvec_together_kernel,
        (tiles[0] if gate else sum(tiles), 1, 1),
        (
            x,
            *padded(weights),
            *padded(scales),
            *padded(biases),
            out,
            *(rows + [1] * (MOST_WEIGHTS - count)),
            *([weight.stride(0) for weight in weights] + [columns] * (MOST_WEIGHTS - count)),
        ),
        {
            "K": columns,
            "COUNT": count,
            "KIND": kind,
            "SCALE": 0 if scales[0] is None else 2 if per_row else 1,
            "HAS_BIAS": biases[0] is not None,
            "GATE": gate,
            "ASSEMBLY": assembly,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        warps=warps,
    )


def choose_tile(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """(outputs of a program, columns loaded together, warps): the best of a sweep over a 7 B model's shapes on an H200."""
    if columns > 8192:
        return (4, 2048, 4) if itemsize == 1 else (4, 1024, 4)
    if rows >= 65536:
        return 16, 512, 4
    if rows >= 8192:
        return (4, 512, 2) if itemsize == 1 else (8, 512, 4)
    return 4, 512, 4
